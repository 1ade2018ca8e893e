package main

import (
	"cmp"
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"firn.io/firn/cluster/clusterpb"
	"firn.io/firn/internal/block"
)

type diskView struct {
	ID            string `json:"id"`
	CapacityBytes int64  `json:"capacity_bytes"`
	Failed        bool   `json:"failed"`
	State         string `json:"state"` // ok, filling, slow, full, failed; unknown if its node did not answer
	Reason        string `json:"reason"`
	*diskFill            // nil, and left out, if unknown
}

type diskFill struct {
	FillPercent  float64 `json:"fill_percent"`
	RoomBytes    int64   `json:"room_bytes"`
	TakenBytes   int64   `json:"taken_bytes"`
	LiveBytes    int64   `json:"live_bytes"`
	LogBytes     int64   `json:"log_bytes"`
	CorruptReads uint64  `json:"corrupt_reads"`
}

type nodeView struct {
	ID    uint32     `json:"id"`
	Addr  string     `json:"addr"`
	Zone  string     `json:"zone"`
	Alive bool       `json:"alive"`
	Disks []diskView `json:"disks"`

	*replicasView // nil, and left out, if the node did not answer
}

// replicasView is what a node says of its replicas.
type replicasView struct {
	Replicas       uint32 `json:"replicas"`
	HaltedReplicas uint32 `json:"halted_replicas"`
	// Replaced ones whose data is still to be removed.
	RetiredReplicas uint32 `json:"retired_replicas"`
	// Given are those that the cluster gives the node, Missing those of them that
	// are not on its disks.
	GivenReplicas   uint32 `json:"given_replicas"`
	MissingReplicas uint32 `json:"missing_replicas"`
}

type gatewayView struct {
	ID  string `json:"id"`
	API string `json:"api"`
	NBD string `json:"nbd"`
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

// verdict is the last line of status and of health.
func (h healthView) verdict() string {
	warnings := 0
	for _, p := range h.Problems {
		if p.Severity != severityError {
			warnings++
		}
	}
	errors := len(h.Problems) - warnings
	switch {
	case errors > 0:
		return fmt.Sprintf("not healthy: %d %s, %d %s", errors, plural(errors, "error"), warnings, plural(warnings, "warning"))
	case warnings > 0:
		return fmt.Sprintf("healthy, with %d %s", warnings, plural(warnings, "warning"))
	}
	return "healthy"
}

// severityError is that of problems that make a cluster unhealthy.
const severityError = "error"

func judge(ps []*clusterpb.Problem) healthView {
	h := healthView{Healthy: true, Problems: viewProblems(ps)}
	for _, p := range ps {
		h.Healthy = h.Healthy && p.Severity != severityError
	}
	return h
}

type statusView struct {
	ClusterID string `json:"cluster_id"`
	Version   string `json:"version"`
	Gateway   string `json:"gateway"`
	NBD       string `json:"nbd"`
	// Partial: etcd does not answer. What is not known then is left out, and
	// Volumes are those attached here.
	Partial  bool          `json:"partial"`
	Nodes    []nodeView    `json:"nodes,omitzero"`
	Gateways []gatewayView `json:"gateways,omitzero"`
	*groupsView
	Volumes []volumeView `json:"volumes"`
	Repairs []repairView `json:"repairs,omitzero"`
	healthView
}

type groupsView struct {
	Groups         uint32 `json:"groups"`
	DegradedGroups uint32 `json:"degraded_groups"`
	StuckGroups    uint32 `json:"stuck_groups"`
}

func viewStatus(s *clusterpb.StatusResponse) statusView {
	v := statusView{ClusterID: s.ClusterId, Version: s.Version, Gateway: s.Gateway, NBD: s.NbdAddr, Partial: s.Partial,
		Volumes: viewVolumes(s.Volumes), healthView: judge(s.Problems)}
	if s.Partial {
		for i := range v.Volumes {
			v.Volumes[i].forget()
		}
		return v
	}
	v.Nodes, v.Repairs, v.Gateways = viewNodes(s.Nodes), viewRepairs(s.Repairs), []gatewayView{}
	for _, g := range s.Gateways {
		v.Gateways = append(v.Gateways, gatewayView{g.Id, g.ApiAddr, g.NbdAddr})
	}
	v.groupsView = &groupsView{s.Groups, s.DegradedGroups, s.StuckGroups}
	return v
}

func writeGateways(w io.Writer, gs []gatewayView) {
	fmt.Fprintln(w, "GATEWAY\tAPI\tNBD")
	for _, g := range gs {
		fmt.Fprintf(w, "%s\t%s\t%s\n", g.ID, g.API, g.NBD)
	}
}

func viewNodes(ns []*clusterpb.Node) []nodeView {
	out := make([]nodeView, 0, len(ns))
	for _, n := range ns {
		v := nodeView{ID: n.Id, Addr: n.Addr, Zone: n.Zone, Alive: n.Alive, Disks: []diskView{}}
		if n.Answered {
			v.replicasView = &replicasView{n.Replicas, n.HaltedReplicas, n.RetiredReplicas, n.GivenReplicas, n.MissingReplicas}
		}
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
	fmt.Fprintln(w, "NODE\tADDRESS\tZONE\tSTATE\tDISKS\tCAPACITY\tREPLICAS")
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
		replicas := "-"
		switch r := n.replicasView; {
		case r == nil:
		case r.MissingReplicas > 0:
			replicas = fmt.Sprintf("%d of %d are missing", r.MissingReplicas, r.GivenReplicas)
		default:
			replicas = fmt.Sprint(r.Replicas)
		}
		fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%s\t%s\t%s\n", n.ID, n.Addr, orDash(n.Zone), state, disks, formatSize(capacity), replicas)
	}
}

// writeDisks lists the disks with how full they are, by the watermarks.
func writeDisks(w io.Writer, ns []nodeView) {
	fmt.Fprintln(w, "DISK\tNODE\tSTATE\tFILL\tLIVE\tLOG\tROOM")
	for _, n := range ns {
		for _, d := range n.Disks {
			if d.diskFill == nil || d.RoomBytes == 0 {
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
		Use: "status", Short: "Show the cluster: nodes, gateways, volumes, what is wrong", Args: cobra.NoArgs,
		Long: `Show the cluster: nodes, gateways, volumes, what is wrong.

The last line is the verdict of 'firn health'. The exit status is 0 whenever there
was an answer; for the verdict as exit status use 'firn health'.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			var s *clusterpb.StatusResponse
			err := r.call(cmd.Context(), "asking for the status", func(ctx context.Context, api clusterpb.AdminClient) (err error) {
				s, err = api.Status(ctx, &clusterpb.StatusRequest{})
				return err
			})
			if err != nil {
				return err
			}
			v := viewStatus(s)
			return r.print(v, v.write)
		},
	}
	r.flags(cmd)
	return cmd
}

func (v statusView) write(w io.Writer) {
	fmt.Fprintf(w, "cluster %s, firn %s\n", cmp.Or(v.ClusterID, "not known yet"), v.Version)
	fmt.Fprintf(w, "gateway %s serves NBD on %s\n", v.Gateway, v.NBD)
	if v.Partial {
		fmt.Fprintf(w, "nodes, groups and other gateways: unknown, etcd does not answer; %d %s attached here\n", len(v.Volumes), plural(len(v.Volumes), "volume"))
	} else {
		up := 0
		for _, n := range v.Nodes {
			if n.Alive {
				up++
			}
		}
		fmt.Fprintf(w, "%d of %d %s up, %d %s, %d %s\n\n", up, len(v.Nodes), plural(len(v.Nodes), "node"),
			v.Groups, plural(int(v.Groups), "group"), len(v.Volumes), plural(len(v.Volumes), "volume"))
		writeNodes(w, v.Nodes)
		fmt.Fprintln(w)
		writeDisks(w, v.Nodes)
		fmt.Fprintln(w)
		writeGateways(w, v.Gateways)
	}
	if len(v.Volumes) > 0 {
		fmt.Fprintln(w)
		writeVolumes(w, v.Volumes)
	}
	if len(v.Repairs) > 0 {
		fmt.Fprintln(w)
		writeRepairs(w, v.Repairs)
	}
	fmt.Fprintln(w)
	v.healthView.write(w)
}

// write ends with the verdict.
func (h healthView) write(w io.Writer) {
	writeProblems(w, h.Problems)
	fmt.Fprintln(w, h.verdict())
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
			err = r.print(v, v.write)
			if err == nil && !v.Healthy {
				err = quietFailure{block.Errorf(block.Internal, "not healthy")}
			}
			return err
		},
	}
	r.flags(cmd)
	return cmd
}
