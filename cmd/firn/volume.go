package main

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"firn.io/firn/cluster/clusterpb"
	"firn.io/firn/internal/block"
)

// volumeView is a volume as --json shows it. Fields are added, never renamed.
type volumeView struct {
	Name       string   `json:"name"`
	ID         string   `json:"id"`
	SizeBytes  int64    `json:"size_bytes"`
	BlockSize  uint32   `json:"block_size"`
	Replicas   uint32   `json:"replicas,omitzero"`
	ReadOnly   bool     `json:"read_only"`
	State      string   `json:"state"`
	Generation *uint32  `json:"generation,omitzero"`
	Epoch      *uint64  `json:"epoch,omitzero"`
	AttachedTo string   `json:"attached_to"`
	Clients    uint32   `json:"clients"`
	Groups     []uint64 `json:"groups,omitzero"`
	// UsedBytes is about what one copy of its data takes; nil if not known.
	UsedBytes *int64 `json:"used_bytes,omitzero"`
}

// forget leaves out what a gateway does not know of a volume by itself.
func (v *volumeView) forget() {
	v.Replicas, v.Generation, v.Epoch, v.Groups, v.UsedBytes = 0, nil, nil, nil, nil
}

func viewVolume(v *clusterpb.Volume) volumeView {
	view := volumeView{
		Name: v.Name, ID: v.Id, SizeBytes: v.SizeBytes, BlockSize: v.BlockSize, Replicas: v.Replicas, ReadOnly: v.ReadOnly,
		State: v.State, Generation: &v.Generation, Epoch: &v.Epoch, AttachedTo: v.AttachedTo, Clients: v.Clients, Groups: v.Groups, UsedBytes: v.UsedBytes,
	}
	if view.Groups == nil {
		view.Groups = []uint64{}
	}
	return view
}

func viewVolumes(vs []*clusterpb.Volume) []volumeView {
	out := make([]volumeView, 0, len(vs))
	for _, v := range vs {
		out = append(out, viewVolume(v))
	}
	return out
}

func (v volumeView) flags() string {
	var out []string
	if v.ReadOnly {
		out = append(out, "read-only")
	}
	if v.State != "ready" {
		out = append(out, v.State)
	}
	if len(out) == 0 {
		return "-"
	}
	return strings.Join(out, ",")
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func (v volumeView) used() string {
	if v.UsedBytes == nil {
		return "-"
	}
	return formatSize(*v.UsedBytes)
}

func writeVolumes(w io.Writer, vs []volumeView) {
	fmt.Fprintln(w, "NAME\tSIZE\tUSED\tREPLICAS\tATTACHED TO\tCLIENTS HERE\tNOTES")
	for _, v := range vs {
		replicas := "-"
		if v.Replicas > 0 {
			replicas = fmt.Sprint(v.Replicas)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%d\t%s\n", v.Name, formatSize(v.SizeBytes), v.used(), replicas, orDash(v.AttachedTo), v.Clients, v.flags())
	}
}

func newVolume(r *remote) *cobra.Command {
	cmd := &cobra.Command{Use: "volume", Short: "Create, show, change and remove volumes"}
	r.flags(cmd)
	cmd.AddCommand(volumeCreate(r), volumeLs(r), volumeShow(r), volumeSet(r), volumeResize(r), volumeRename(r), volumeRm(r))
	return cmd
}

// done reports one changed volume.
func (r *remote) done(v *clusterpb.Volume, format string, args ...any) error {
	return r.print(viewVolume(v), func(w io.Writer) { fmt.Fprintf(w, format+"\n", args...) })
}

func volumeCreate(r *remote) *cobra.Command {
	var replicas, blockSize uint32
	cmd := &cobra.Command{
		Use: "create NAME SIZE", Short: "Create a volume", Args: cobra.ExactArgs(2),
		Long: `Create a volume, and return when it can be attached.

` + sizeHelp,
		Example: "  firn volume create db 100G --replicas 3",
		RunE: func(cmd *cobra.Command, args []string) error {
			bytes, err := parseSize(args[1])
			if err != nil {
				return err
			}
			if cmd.Flags().Changed("replicas") && replicas == 0 {
				return block.Errorf(block.Invalid, "--replicas 0: use 1, 3 or 5")
			}
			var v *clusterpb.Volume
			late := false
			err = r.call(cmd.Context(), "creating "+args[0], func(ctx context.Context, api clusterpb.AdminClient) (err error) {
				v, err = api.CreateVolume(ctx, &clusterpb.CreateVolumeRequest{Name: args[0], SizeBytes: bytes, Replicas: replicas, BlockSize: blockSize})
				late = err != nil && ctx.Err() != nil
				return err
			})
			if late {
				return block.Errorf(block.KindOf(err), "%v; the volume may have been made, or be made still: `firn volume show %s` tells", err, args[0])
			}
			if err != nil {
				return err
			}
			return r.done(v, "created %s, %s, %d %s", v.Name, formatSize(v.SizeBytes), v.Replicas, plural(int(v.Replicas), "replica"))
		},
	}
	cmd.Flags().Uint32Var(&replicas, "replicas", 0, "copies of the data: 1, 3 or 5 (default min(3, nodes))")
	cmd.Flags().Uint32Var(&blockSize, "block-size", 512, "logical block in bytes: 512 or 4096")
	return cmd
}

func plural(n int, word string) string {
	if n == 1 {
		return word
	}
	return word + "s"
}

func volumeLs(r *remote) *cobra.Command {
	return &cobra.Command{
		Use: "ls", Short: "List the volumes", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			var answer *clusterpb.ListVolumesResponse
			err := r.call(cmd.Context(), "listing volumes", func(ctx context.Context, api clusterpb.AdminClient) (err error) {
				answer, err = api.ListVolumes(ctx, &clusterpb.ListVolumesRequest{})
				return err
			})
			if err != nil {
				return err
			}
			views := viewVolumes(answer.Volumes)
			return r.print(views, func(w io.Writer) { writeVolumes(w, views) })
		},
	}
}

func volumeShow(r *remote) *cobra.Command {
	return &cobra.Command{
		Use: "show NAME", Short: "Show everything about a volume", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var answer *clusterpb.Volume
			err := r.call(cmd.Context(), "asking for "+args[0], func(ctx context.Context, api clusterpb.AdminClient) (err error) {
				answer, err = api.ShowVolume(ctx, &clusterpb.ShowVolumeRequest{Name: args[0]})
				return err
			})
			if err != nil {
				return err
			}
			v := viewVolume(answer)
			return r.print(v, func(w io.Writer) {
				fmt.Fprintf(w, "name\t%s\nid\t%s\nsize\t%s (%d bytes)\nused\t%s\nblock size\t%d\nreplicas\t%d\nread-only\t%s\nstate\t%s\n",
					v.Name, v.ID, formatSize(v.SizeBytes), v.SizeBytes, v.used(), v.BlockSize, v.Replicas, onOff(v.ReadOnly), v.State)
				fmt.Fprintf(w, "attached to\t%s\nclients here\t%d\nepoch\t%d\ngeneration\t%d\ngroups\t%s\n",
					orDash(v.AttachedTo), v.Clients, answer.Epoch, answer.Generation, strings.Trim(fmt.Sprint(v.Groups), "[]"))
			})
		},
	}
}

func onOff(b bool) string {
	if b {
		return "on"
	}
	return "off"
}

func volumeSet(r *remote) *cobra.Command {
	return &cobra.Command{
		Use: "set NAME read-only=on|off", Short: "Change a setting of a volume", Args: cobra.MinimumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			req := &clusterpb.SetVolumeRequest{Name: args[0]}
			for _, setting := range args[1:] {
				key, value, _ := strings.Cut(setting, "=")
				on := value == "on"
				if key != "read-only" || !on && value != "off" {
					return block.Errorf(block.Invalid, "no setting %q; there is read-only=on and read-only=off", setting)
				}
				req.ReadOnly = &on
			}
			var v *clusterpb.Volume
			err := r.call(cmd.Context(), "changing "+args[0], func(ctx context.Context, api clusterpb.AdminClient) (err error) {
				v, err = api.SetVolume(ctx, req)
				return err
			})
			if err != nil {
				return err
			}
			return r.done(v, "%s: read-only=%s", v.Name, onOff(v.ReadOnly))
		},
	}
}

func volumeResize(r *remote) *cobra.Command {
	var shrink, force bool
	cmd := &cobra.Command{
		Use: "resize NAME SIZE", Short: "Grow a volume, or shrink it with --shrink", Args: cobra.ExactArgs(2),
		Long: `Grow a volume, or shrink it with --shrink. Clients that are connected see a new
size when they connect anew. A volume with clients is shrunk only with --force.

` + sizeHelp,
		RunE: func(cmd *cobra.Command, args []string) error {
			bytes, err := parseSize(args[1])
			if err != nil {
				return err
			}
			var v *clusterpb.Volume
			err = r.call(cmd.Context(), "resizing "+args[0], func(ctx context.Context, api clusterpb.AdminClient) (err error) {
				v, err = api.ResizeVolume(ctx, &clusterpb.ResizeVolumeRequest{Name: args[0], SizeBytes: bytes, Shrink: shrink, Force: force})
				return err
			})
			if err != nil {
				return err
			}
			return r.done(v, "%s is %s now", v.Name, formatSize(v.SizeBytes))
		},
	}
	cmd.Flags().BoolVar(&shrink, "shrink", false, "allow a smaller size; what lies beyond it is lost")
	cmd.Flags().BoolVar(&force, "force", false, "shrink also while clients are connected")
	markOnlyFlag(cmd, "shrink", "force")
	return cmd
}

func volumeRename(r *remote) *cobra.Command {
	return &cobra.Command{
		Use: "rename NAME NEW-NAME", Short: "Give a volume another name", Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			var v *clusterpb.Volume
			err := r.call(cmd.Context(), "renaming "+args[0], func(ctx context.Context, api clusterpb.AdminClient) (err error) {
				v, err = api.RenameVolume(ctx, &clusterpb.RenameVolumeRequest{Name: args[0], NewName: args[1]})
				return err
			})
			if err != nil {
				return err
			}
			return r.done(v, "%s is called %s now", args[0], v.Name)
		},
	}
}

func volumeRm(r *remote) *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use: "rm NAME", Short: "Remove a volume and its data", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var v *clusterpb.Volume
			err := r.call(cmd.Context(), "asking for "+args[0], func(ctx context.Context, api clusterpb.AdminClient) (err error) {
				v, err = api.ShowVolume(ctx, &clusterpb.ShowVolumeRequest{Name: args[0]})
				return err
			})
			if err != nil {
				return err
			}
			if !yes {
				sure, err := r.ask(fmt.Sprintf("This removes volume %s (%s) and all its data for good.", v.Name, formatSize(v.SizeBytes)), v.Name)
				if err != nil {
					return err
				}
				if !sure {
					return block.Errorf(block.Canceled, "nothing was removed")
				}
			}
			err = r.call(cmd.Context(), "removing "+args[0], func(ctx context.Context, api clusterpb.AdminClient) error {
				_, err := api.RemoveVolume(ctx, &clusterpb.RemoveVolumeRequest{Name: v.Name, Id: v.Id})
				return err
			})
			if err != nil {
				return err
			}
			return r.done(v, "removed %s", v.Name)
		},
	}
	cmd.Flags().BoolVar(&yes, "yes", false, "do not ask")
	markOnlyFlag(cmd, "yes")
	return cmd
}
