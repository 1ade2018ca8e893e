package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/internal/block"
	"firn.io/firn/nbd/attach"
)

// attachFlags are those of `firn attach`.
type attachFlags struct {
	gateways                    []string
	connections                 int
	device                      string
	blockSize                   int
	deadTime, wait, requestTime time.Duration
	foreground                  bool
	http, runDir, logLevel      string
	tls                         certFiles
}

const attachLong = `Make a volume a block device of this machine: /dev/nbdN, and /dev/firn/NAME.

A small process stays and keeps it connected: when the gateway goes, it dials the
same or another one of --gateway, and the kernel repeats what was not answered.
Programs that use the device notice a pause and no error; --dead-time sets a limit
to that. A volume that has grown grows here too. Attaching twice is attaching
once. After the process was stopped or killed the device goes on while its
connections live, and the same command takes it up again.

'firn detach NAME' ends it.`

func newAttach(c *console) *cobra.Command {
	var f attachFlags
	cmd := &cobra.Command{
		Use: "attach NAME", Short: "Make a volume a block device of this machine", Args: cobra.ExactArgs(1), Long: attachLong,
		Example: "  firn attach db\n  firn attach db --gateway gw1:10809,gw2:10809\n  mkfs.ext4 /dev/firn/db",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := startLog(c, f.logLevel); err != nil {
				return err
			}
			cfg, err := f.config(args[0])
			if err != nil {
				return err
			}
			a := &attachment{console: c, cfg: cfg, flags: f, files: attachFiles{f.runDir, cfg.Export}}
			if f.foreground {
				return a.foreground(cmd.Context())
			}
			return a.background(cmd.Context())
		},
	}
	flags := cmd.Flags()
	flags.StringSliceVar(&f.gateways, "gateway", []string{defaultNBD}, "NBD addresses of gateways, in order of preference")
	flags.IntVar(&f.connections, "connections", 1, "connections side by side; more of them are faster, see the documentation for their limit")
	flags.StringVar(&f.device, "device", "", "the device to use, /dev/nbdN (default: any that is free)")
	flags.IntVar(&f.blockSize, "block-size", 512, "logical block of the device in bytes: 512 or 4096")
	flags.DurationVar(&f.requestTime, "request-time", 0, "a request without an answer for this long is sent again on a new connection (default: never, or 30s with several connections)")
	flags.DurationVar(&f.deadTime, "dead-time", 0, "without a gateway for this long, requests fail; 0: they wait")
	flags.DurationVar(&f.wait, "wait", 0, "how long to try if no gateway answers at first")
	flags.StringVar(&f.tls.ca, "tls-ca", "", "PEM certificates that gateways' certificates must be signed by; with it the gateways must speak TLS")
	flags.StringVar(&f.tls.cert, "tls-cert", "", "PEM certificate shown to gateways, with --tls-ca")
	flags.StringVar(&f.tls.key, "tls-key", "", "PEM key of --tls-cert")
	flags.BoolVar(&f.foreground, "foreground", false, "stay in the foreground, as under systemd")
	flags.StringVar(&f.http, "http", "", "serve /healthz, /readyz and /metrics of this attachment here; empty: nowhere")
	logFlag(cmd, &f.logLevel, "info")
	cmd.PersistentFlags().StringVar(&f.runDir, "run-dir", defaultRunDir, "folder of what is attached on this machine")
	cmd.AddCommand(attachLs(c, &f.runDir), attachUdev(c, &f.runDir))
	return cmd
}

func (f *attachFlags) config(name string) (attach.Config, error) {
	cfg := attach.Config{Export: name, Gateways: f.gateways, Connections: f.connections, Index: -1, BlockBytes: f.blockSize, RequestTime: f.requestTime, DeadTime: f.deadTime}
	if err := meta.CheckVolumeName(name); err != nil {
		return cfg, err
	}
	for _, g := range f.gateways {
		if _, _, err := net.SplitHostPort(g); err != nil && !strings.HasPrefix(g, "unix:") {
			return cfg, block.Errorf(block.Invalid, "--gateway %q: write HOST:PORT or unix:PATH", g)
		}
	}
	if f.device != "" {
		index, ok := attach.ParseDevice(f.device)
		if !ok {
			return cfg, block.Errorf(block.Invalid, "--device %q: write /dev/nbdN", f.device)
		}
		cfg.Index = index
	}
	return cfg, f.secure(&cfg)
}

// secure sets TLS, if that is asked for. The files' paths are made absolute, for
// the process that stays is in another folder.
func (f *attachFlags) secure(cfg *attach.Config) (err error) {
	switch {
	case f.tls == (certFiles{}):
		return nil
	case f.tls.ca == "":
		return block.Errorf(block.Invalid, "--tls-cert and --tls-key need --tls-ca, by which the gateways are known")
	case (f.tls.cert == "") != (f.tls.key == ""):
		return block.Errorf(block.Invalid, "--tls-cert and --tls-key belong together")
	}
	for _, file := range []*string{&f.tls.ca, &f.tls.cert, &f.tls.key} {
		if *file != "" {
			if *file, err = filepath.Abs(*file); err != nil {
				return err
			}
		}
	}
	if cfg.TLS, err = f.tls.load("NBD's"); err == nil {
		cfg.TLS.ClientSessionCache = tls.NewLRUClientSessionCache(len(f.gateways))
	}
	return err
}

// attachment is one volume on this machine, in the process that keeps it.
type attachment struct {
	*console
	cfg   attach.Config
	flags attachFlags
	files attachFiles
}

// readyFD is the descriptor on which a process in the background tells how its
// start went; it is named in the environment, for it may be anything in a process
// that was started otherwise.
const (
	readyFD  = 3
	readyEnv = "FIRN_ATTACH_READY"
)

// outcome is what is told there.
type attachOutcome struct {
	View  *attachView
	Error string
	Kind  block.Kind
}

// background starts this program again, in a session of its own, and waits until
// the device is there.
func (a *attachment) background(ctx context.Context) error {
	if err := a.files.make(); err != nil {
		return err
	}
	log, err := os.OpenFile(a.files.path("log"), os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	cmd := exec.Command("/proc/self/exe", a.arguments()...)
	cmd.Args[0] = "firn"
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = log, log, []*os.File{w}
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), readyEnv+"="+strconv.Itoa(readyFD))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	w.Close()
	if err != nil {
		return err
	}
	var o attachOutcome
	err = a.waiting(ctx, "attaching "+a.cfg.Export, func(ctx context.Context) error {
		stop := context.AfterFunc(ctx, func() { cmd.Process.Signal(syscall.SIGTERM) })
		defer stop()
		return json.NewDecoder(r).Decode(&o)
	})
	switch {
	case ctx.Err() != nil:
		return block.Errorf(block.Canceled, "interrupted")
	case err != nil:
		text, _ := os.ReadFile(a.files.path("log"))
		return block.Errorf(block.Internal, "the process that keeps the device ended: %v\n%s", err, text)
	case o.View == nil:
		return block.Errorf(o.Kind, "%s", o.Error)
	}
	return a.show(*o.View)
}

// arguments are the command line of the process in the background.
func (a *attachment) arguments() []string {
	f := a.flags
	args := []string{"attach", a.cfg.Export, "--foreground", "--run-dir", f.runDir, "--gateway", strings.Join(f.gateways, ","),
		"--connections", strconv.Itoa(f.connections), "--block-size", strconv.Itoa(f.blockSize),
		"--request-time", f.requestTime.String(), "--dead-time", f.deadTime.String(), "--wait", f.wait.String(), "--log-level", f.logLevel}
	if f.device != "" {
		args = append(args, "--device", f.device)
	}
	for flag, value := range map[string]string{"--http": f.http, "--tls-ca": f.tls.ca, "--tls-cert": f.tls.cert, "--tls-key": f.tls.key} {
		if value != "" {
			args = append(args, flag, value)
		}
	}
	return args
}

func (a *attachment) show(v attachView) error {
	return a.print(v, func(w io.Writer) { fmt.Fprintln(w, v.Device) })
}

// foreground attaches, tells whoever started it, and keeps the device until it
// is detached or a signal comes.
func (a *attachment) foreground(ctx context.Context) error {
	told := false
	tell := func(o attachOutcome) error {
		if told = true; os.Getenv(readyEnv) != "" {
			w := os.NewFile(readyFD, "ready")
			return errors.Join(json.NewEncoder(w).Encode(o), w.Close())
		}
		if o.View != nil {
			return errors.Join(a.show(*o.View), notifySystemd("READY=1\nSTATUS="+o.View.Device))
		}
		return nil
	}
	err := a.keep(ctx, func(v attachView) error { return tell(attachOutcome{View: &v}) })
	if err != nil && !told {
		err = errors.Join(err, tell(attachOutcome{Error: err.Error(), Kind: block.KindOf(err)}))
	}
	return err
}

// keep holds the lock of the volume on this machine, attaches or adopts its
// device, and runs it.
func (a *attachment) keep(ctx context.Context, ready func(attachView) error) error {
	if err := a.files.make(); err != nil {
		return err
	}
	armor()
	lock, err := a.files.lock()
	if isKind(err, block.Busy) {
		v, err := a.already(ctx)
		if err != nil {
			return err
		}
		return ready(v)
	}
	if err != nil {
		return err
	}
	defer lock.Close()
	d, err := a.open(ctx)
	if err != nil {
		return err
	}
	defer d.Close()
	stopHTTP, err := a.serveHTTP(d)
	if err != nil {
		return errors.Join(err, attach.Disconnect(d.Status().Index))
	}
	defer stopHTTP()
	a.files.changed(d.Status())
	if err := a.files.link(d.Path()); err != nil {
		slog.Warn("no stable path", "err", err)
	}
	slog.Info("attached", "volume", a.cfg.Export, "device", d.Path(), "gateway", d.Status().Gateway, "bytes", d.Status().Bytes, "tls", d.Status().TLS)
	if err := ready(viewAttached(d.Status(), os.Getpid())); err != nil {
		slog.Warn("tell that the device is ready", "err", err)
	}
	err = d.Run(ctx)
	if err == nil {
		return a.files.remove()
	}
	if ctx.Err() != nil {
		slog.Info("stopped; the device stays, and nobody makes new connections for it until the volume is attached again", "device", d.Path())
		return nil
	}
	return err
}

// already waits for what the process that has the lock says.
func (a *attachment) already(ctx context.Context) (attachView, error) {
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	var v attachView
	err := awaitReady(ctx, func(context.Context) (err error) {
		v, err = a.files.view()
		return err
	})
	return v, err
}

// open adopts the device that an earlier process left, or attaches a new one.
func (a *attachment) open(ctx context.Context) (*attach.Device, error) {
	a.cfg.Log, a.cfg.Changed = slog.Default(), a.files.changed
	last, err := a.files.read()
	if err == nil && attach.IsConnected(last.Index) {
		slog.Info("taking up a device that is attached already", "volume", a.cfg.Export, "device", last.Device)
		return attach.Adopt(a.cfg, last.Status)
	}
	ctx, cancel := context.WithTimeout(ctx, max(a.flags.wait, startTime))
	defer cancel()
	var d *attach.Device
	start := time.Now()
	waitErr := awaitReady(ctx, func(ctx context.Context) error {
		d, err = attach.Attach(ctx, a.cfg)
		if err != nil && (block.KindOf(err) != block.Unavailable || time.Since(start) > a.flags.wait) {
			cancel() // waiting helps no more
		}
		return err
	})
	if err == nil && waitErr != nil {
		err = waitErr
	}
	return d, err
}
