package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"firn.io/firn/cluster/clusterpb"
	"firn.io/firn/internal/block"
)

type diskView struct {
	ID            string  `json:"id"`
	CapacityBytes int64   `json:"capacity_bytes"`
	Failed        bool    `json:"failed"`
	State         string  `json:"state"` // ok, filling, slow, full, failed; unknown if its node did not answer
	Reason        string  `json:"reason"`
	FillPercent   float64 `json:"fill_percent"`
	RoomBytes     int64   `json:"room_bytes"`
	TakenBytes    int64   `json:"taken_bytes"`
	LiveBytes     int64   `json:"live_bytes"`
	LogBytes      int64   `json:"log_bytes"`
	CorruptReads  uint64  `json:"corrupt_reads"`
}

type nodeView struct {
	ID    uint32     `json:"id"`
	Addr  string     `json:"addr"`
	Zone  string     `json:"zone"`
	Alive bool       `json:"alive"`
	Disks []diskView `json:"disks"`

	Replicas       uint32 `json:"replicas"`
	HaltedReplicas uint32 `json:"halted_replicas"`
	// Replaced ones whose data is still to be removed.
	RetiredReplicas uint32 `json:"retired_replicas"`
}

type problemView struct {
	Severity string `json:"severity"`
	What     string `json:"what"`
	Remedy   string `json:"remedy"`
}

type healthView struct {
	Healthy  bool          `json:"healthy"`
	Problems []problemView `json:"problems"`
}

type statusView struct {
	ClusterID string        `json:"cluster_id"`
	Version   string        `json:"version"`
	Gateway   string        `json:"gateway"`
	NBD       string        `json:"nbd"`
	Nodes     []nodeView    `json:"nodes"`
	Groups    uint32        `json:"groups"`
	Volumes   []volumeView  `json:"volumes"`
	Repairs   []repairView  `json:"repairs"`
	Problems  []problemView `json:"problems"`
}

func viewNodes(ns []*clusterpb.Node) []nodeView {
	out := make([]nodeView, 0, len(ns))
	for _, n := range ns {
		v := nodeView{ID: n.Id, Addr: n.Addr, Zone: n.Zone, Alive: n.Alive, Disks: []diskView{}, Replicas: n.Replicas, HaltedReplicas: n.HaltedReplicas,
			RetiredReplicas: n.RetiredReplicas}
		for _, d := range n.Disks {
			v.Disks = append(v.Disks, viewDisk(d))
		}
		out = append(out, v)
	}
	return out
}

func viewProblems(ps []*clusterpb.Problem) []problemView {
	out := make([]problemView, 0, len(ps))
	for _, p := range ps {
		out = append(out, problemView{p.Severity, p.What, p.Remedy})
	}
	return out
}

func writeNodes(w io.Writer, ns []nodeView) {
	fmt.Fprintln(w, "NODE\tADDRESS\tZONE\tSTATE\tDISKS\tCAPACITY")
	for _, n := range ns {
		var capacity int64
		failed := 0
		for _, d := range n.Disks {
			capacity += d.CapacityBytes
			if d.Failed {
				failed++
			}
		}
		state := "down"
		if n.Alive {
			state = "up"
		}
		disks := fmt.Sprint(len(n.Disks))
		if failed > 0 {
			disks += fmt.Sprintf(" (%d failed)", failed)
		}
		fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%s\t%s\n", n.ID, n.Addr, orDash(n.Zone), state, disks, formatSize(capacity))
	}
}

// writeDisks lists the disks with how full they are, by the watermarks.
func writeDisks(w io.Writer, ns []nodeView) {
	fmt.Fprintln(w, "DISK\tNODE\tSTATE\tFILL\tLIVE\tLOG\tROOM")
	for _, n := range ns {
		for _, d := range n.Disks {
			if d.RoomBytes == 0 {
				fmt.Fprintf(w, "%s\t%d\t%s\t-\t-\t-\t-\n", d.ID, n.ID, d.State)
				continue
			}
			fmt.Fprintf(w, "%s\t%d\t%s\t%.0f%%\t%s\t%s\t%s\n", d.ID, n.ID, d.State, d.FillPercent,
				formatSize(d.LiveBytes), formatSize(d.LogBytes), formatSize(d.RoomBytes))
		}
	}
	fmt.Fprintln(w, watermarks)
}

func writeProblems(w io.Writer, ps []problemView) {
	for _, p := range ps {
		fmt.Fprintf(w, "%s: %s\n", p.Severity, p.What)
		if p.Remedy != "" {
			fmt.Fprintf(w, "  %s\n", p.Remedy)
		}
	}
}

func nodeLs(r *remote) *cobra.Command {
	cmd := &cobra.Command{
		Use: "ls", Short: "List the storage nodes", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			var answer *clusterpb.ListNodesResponse
			err := r.call(cmd.Context(), "listing nodes", func(ctx context.Context, api clusterpb.AdminClient) (err error) {
				answer, err = api.ListNodes(ctx, &clusterpb.ListNodesRequest{})
				return err
			})
			if err != nil {
				return err
			}
			views := viewNodes(answer.Nodes)
			return r.print(views, func(w io.Writer) { writeNodes(w, views) })
		},
	}
	return cmd
}

func newStatus(r *remote) *cobra.Command {
	cmd := &cobra.Command{
		Use: "status", Short: "Show the cluster: nodes, volumes, what is wrong", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			var s *clusterpb.StatusResponse
			err := r.call(cmd.Context(), "asking for the status", func(ctx context.Context, api clusterpb.AdminClient) (err error) {
				s, err = api.Status(ctx, &clusterpb.StatusRequest{})
				return err
			})
			if err != nil {
				return err
			}
			v := statusView{
				ClusterID: s.ClusterId, Version: s.Version, Gateway: s.Gateway, NBD: s.NbdAddr, Nodes: viewNodes(s.Nodes),
				Groups: s.Groups, Volumes: viewVolumes(s.Volumes), Repairs: viewRepairs(s.Repairs), Problems: viewProblems(s.Problems),
			}
			return r.print(v, func(w io.Writer) {
				up := 0
				for _, n := range v.Nodes {
					if n.Alive {
						up++
					}
				}
				fmt.Fprintf(w, "cluster %s, firn %s\n", v.ClusterID, v.Version)
				fmt.Fprintf(w, "gateway %s serves NBD on %s\n", v.Gateway, v.NBD)
				fmt.Fprintf(w, "%d of %d %s up, %d %s, %d %s\n\n", up, len(v.Nodes), plural(len(v.Nodes), "node"),
					v.Groups, plural(int(v.Groups), "group"), len(v.Volumes), plural(len(v.Volumes), "volume"))
				writeNodes(w, v.Nodes)
				fmt.Fprintln(w)
				writeDisks(w, v.Nodes)
				if len(v.Volumes) > 0 {
					fmt.Fprintln(w)
					writeVolumes(w, v.Volumes)
				}
				if len(v.Repairs) > 0 {
					fmt.Fprintln(w)
					writeRepairs(w, v.Repairs)
				}
				fmt.Fprintln(w)
				if len(v.Problems) == 0 {
					fmt.Fprintln(w, "healthy")
				}
				writeProblems(w, v.Problems)
			})
		},
	}
	r.flags(cmd)
	return cmd
}

func newHealth(r *remote) *cobra.Command {
	cmd := &cobra.Command{
		Use: "health", Short: "Succeed if all is well, else say what is wrong", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			var h *clusterpb.HealthResponse
			err := r.call(cmd.Context(), "asking for the health", func(ctx context.Context, api clusterpb.AdminClient) (err error) {
				h, err = api.Health(ctx, &clusterpb.HealthRequest{})
				return err
			})
			if err != nil {
				return err
			}
			v := healthView{Healthy: h.Healthy, Problems: viewProblems(h.Problems)}
			err = r.print(v, func(w io.Writer) {
				if v.Healthy {
					fmt.Fprintln(w, "healthy")
				}
				writeProblems(w, v.Problems)
			})
			if err == nil && !v.Healthy {
				err = quietFailure{block.Errorf(block.Internal, "not healthy")}
			}
			return err
		},
	}
	r.flags(cmd)
	return cmd
}
