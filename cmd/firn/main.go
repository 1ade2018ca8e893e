// Command firn is block storage for Linux hosts and virtual machines: a storage
// node, a gateway that serves volumes over NBD and iSCSI, both in one process (`firn
// up`), and the tool that talks to them. This is the only place where the
// concrete kinds of Firn's parts meet: flags and configuration are read here,
// parts are opened in order and closed in reverse.
package main

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"

	"firn.io/firn/internal/block"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	// After the first signal the next one ends the process at once.
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, systemConsole(), os.LookupEnv, os.Args[1:]))
}

// run is the whole program, for main and for tests.
func run(ctx context.Context, c *console, lookup func(string) (string, bool), args []string) int {
	root := newRoot(c, lookup)
	root.SetArgs(args)
	root.SetOut(c.out)
	root.SetErr(c.err)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	var quiet quietFailure
	if !errors.As(err, &quiet) {
		c.complain(err)
	}
	return exitCode(err)
}

// quietFailure is a failure that has been shown already.
type quietFailure struct{ error }

func newRoot(c *console, lookup func(string) (string, bool)) *cobra.Command {
	root := &cobra.Command{
		Use:   "firn",
		Short: "Replicated block volumes over NBD and iSCSI",
		Long: `Firn gives Linux hosts and virtual machines replicated block volumes over NBD
and iSCSI.

Start with:  firn up --volume demo=10G

Every flag can also come from the environment (FIRN_NBD for --nbd) or from the
file of --config, a YAML map of flag names.`,
		Version:       version(),
		SilenceUsage:  true,
		SilenceErrors: true,
		PersistentPreRunE: func(cmd *cobra.Command, args []string) error {
			return configure(cmd, lookup)
		},
	}
	root.CompletionOptions.HiddenDefaultCmd = true
	root.PersistentFlags().String("config", "", "read flags from this YAML file")
	root.PersistentFlags().BoolVar(&c.json, "json", false, "print JSON")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return block.Errorf(block.Invalid, "%s; see `%s --help`", human(err), cmd.CommandPath())
	})
	remote := &remote{console: c}
	root.AddCommand(
		newUp(c), newNode(c, remote), newGateway(c),
		newVolume(remote), newAttach(c), newDetach(remote), newStatus(remote), newHealth(remote), exitCodes(),
	)
	usageIsInvalid(root)
	return root
}

// usageIsInvalid gives errors about arguments the kind Invalid, also for a
// command that only holds others.
func usageIsInvalid(cmd *cobra.Command) {
	if cmd.HasSubCommands() && cmd.RunE == nil {
		cmd.Args = cobra.ArbitraryArgs
		cmd.RunE = func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return block.Errorf(block.Invalid, "unknown command %q; see `%s --help`", args[0], cmd.CommandPath())
			}
			return cmd.Help()
		}
	} else if check := cmd.Args; check != nil {
		cmd.Args = func(cmd *cobra.Command, args []string) error {
			if err := check(cmd, args); err != nil {
				return block.Errorf(block.Invalid, "%s; usage: %s", human(err), cmd.UseLine())
			}
			return nil
		}
	}
	for _, sub := range cmd.Commands() {
		usageIsInvalid(sub)
	}
}

// exitCodes is a help topic.
func exitCodes() *cobra.Command {
	return &cobra.Command{
		Use:   "exit-codes",
		Short: "What the exit status says",
		Long: `  0   done
  1   an error of another kind; for health: something is wrong
  2   the command line, or a value in it, makes no sense
  3   there is no such volume
  4   the name is taken
  5   in use: an attached volume, a locked folder, a taken port
  6   nobody answers: no gateway, no etcd, no majority
  7   no space
  8   read-only
  9   out of range
 10   a newer owner took the volume
 11   damaged data
 12   not allowed
 13   not supported
130   interrupted`,
	}
}

// revision is the commit that `make` built, where Go does not note it itself
// (GOFLAGS=-buildvcs=false, `go run`): set by the linker.
var revision string

// version is the module version, or the commit of a build from a checkout.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	if v := info.Main.Version; v != "" && v != "(devel)" {
		return v
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" && len(s.Value) >= 12 {
			return "devel-" + s.Value[:12]
		}
	}
	if revision != "" {
		return "devel-" + revision
	}
	return "devel"
}
