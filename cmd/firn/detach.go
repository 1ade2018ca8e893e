package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"firn.io/firn/cluster/clusterpb"
)

// detachedView is what `firn detach --json` prints. Gateway is empty if nobody
// had the volume.
type detachedView struct {
	Volume  string `json:"volume"`
	Gateway string `json:"gateway"`
	Removed bool   `json:"removed"`
}

func newDetach(r *remote) *cobra.Command {
	var force bool
	var runDir string
	cmd := &cobra.Command{
		Use: "detach NAME|DEVICE", Short: "End an attachment: of a device here, or of a volume at its gateway", Args: cobra.ExactArgs(1),
		Long: `If the volume is attached on this machine by 'firn attach', end that: the device
is disconnected. A device that is mounted stays, unless it is named as DEVICE with
--force; then its requests fail.

Otherwise end the attachment of the volume at the gateway that has it, so that
another can take it at once. Without --force a volume that has clients stays.

With --force its clients are cut off there, and that gateway does not take the
volume again for some seconds. A gateway that does not answer loses the volume
too; what it still sends is refused by the nodes, and the next gateway waits
until the old one surely serves nothing any more.`,
		Example: "  firn detach vm1\n  firn detach /dev/nbd0\n  firn detach vm1 --force",
		RunE: func(cmd *cobra.Command, args []string) error {
			if done, err := detachDevice(r.console, runDir, args[0], force); done || err != nil {
				return err
			}
			var answer *clusterpb.DetachVolumeResponse
			err := r.call(cmd.Context(), "detaching "+args[0], func(ctx context.Context, api clusterpb.AdminClient) (err error) {
				answer, err = api.DetachVolume(ctx, &clusterpb.DetachVolumeRequest{Name: args[0], Force: force})
				return err
			})
			if err != nil {
				return err
			}
			v := detachedView{Volume: args[0], Gateway: answer.Gateway, Removed: answer.Removed}
			return r.print(v, func(w io.Writer) {
				switch {
				case v.Gateway == "":
					fmt.Fprintf(w, "%s is not attached\n", v.Volume)
				case v.Removed:
					fmt.Fprintf(w, "%s was taken from gateway %s, which does not answer\n", v.Volume, v.Gateway)
				default:
					fmt.Fprintf(w, "%s is detached from gateway %s\n", v.Volume, v.Gateway)
				}
			})
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "also if it has clients, which are cut off, or if its gateway does not answer")
	markOnlyFlag(cmd, "force")
	cmd.Flags().StringVar(&runDir, "run-dir", defaultRunDir, "folder of what is attached on this machine")
	r.flags(cmd)
	return cmd
}
