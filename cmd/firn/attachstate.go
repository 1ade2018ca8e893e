package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"sort"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"firn.io/firn/internal/block"
	"firn.io/firn/nbd/attach"
)

const (
	// defaultRunDir is in memory, and gone after a restart as the devices are.
	defaultRunDir = "/run/firn/attach"
	// linkDir is where the stable paths are.
	linkDir = "/dev/firn"
)

// attachView is an attachment as --json shows it. Fields are added, never renamed.
type attachView struct {
	Device string `json:"device"`
	Path   string `json:"path"`
	attach.Status
	PID int `json:"pid"`
	// Kept tells whether the process lives that makes new connections.
	Kept bool `json:"kept"`
}

func viewAttached(s attach.Status, pid int) attachView {
	return attachView{Device: fmt.Sprintf("/dev/nbd%d", s.Index), Path: filepath.Join(linkDir, s.Export), Status: s, PID: pid, Kept: true}
}

// attachFiles are the files of one volume's attachment in a folder.
type attachFiles struct{ dir, name string }

func (f attachFiles) path(kind string) string { return filepath.Join(f.dir, f.name+"."+kind) }

func (f attachFiles) make() error {
	if err := os.MkdirAll(f.dir, 0o700); err != nil {
		return block.Wrap(block.Denied, err, "folder of attachments; run this as root, or name another with --run-dir")
	}
	return nil
}

// lock is held by the process that keeps the device. Busy: there is one.
func (f attachFiles) lock() (io.Closer, error) {
	file, err := os.OpenFile(f.path("lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = block.Errorf(block.Busy, "volume %s is attached on this machine already", f.name)
	}
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return file, nil
}

func isKind(err error, k block.Kind) bool { return err != nil && block.KindOf(err) == k }

// changed writes the status down, for `attach ls`, for udev, and for the process
// that takes up the device after this one.
func (f attachFiles) changed(s attach.Status) {
	if s.Index < 0 {
		return
	}
	text, err := json.MarshalIndent(viewAttached(s, os.Getpid()), "", "  ")
	if err == nil {
		err = os.WriteFile(f.path("new"), append(text, '\n'), 0o600)
	}
	if err == nil {
		err = os.Rename(f.path("new"), f.path("json"))
	}
	if err != nil {
		slog.Warn("write the state of the attachment", "err", err)
	}
}

// read returns what was written last; NotFound: nothing.
func (f attachFiles) read() (v attachView, err error) {
	text, err := os.ReadFile(f.path("json"))
	if errors.Is(err, fs.ErrNotExist) {
		return v, block.Errorf(block.NotFound, "volume %s is not attached on this machine", f.name)
	}
	if err == nil {
		err = json.Unmarshal(text, &v)
	}
	return v, err
}

// view is read, with whether the process that wrote it still keeps the device.
func (f attachFiles) view() (attachView, error) {
	v, err := f.read()
	if err != nil {
		return v, err
	}
	if !attach.IsConnected(v.Index) {
		return v, block.Errorf(block.NotFound, "volume %s is not attached on this machine any more", f.name)
	}
	lock, err := f.lock()
	if v.Kept = isKind(err, block.Busy); v.Kept {
		return v, nil
	}
	if err == nil {
		err = lock.Close()
	}
	return v, err
}

// link makes the stable path where udev does not, and makes udev look.
func (f attachFiles) link(device string) error {
	uevent := filepath.Join("/sys/block", filepath.Base(device), "uevent")
	if err := os.WriteFile(uevent, []byte("change"), 0); err != nil {
		return err
	}
	path := filepath.Join(linkDir, f.name)
	if at, err := os.Readlink(path); err == nil && filepath.Base(at) == filepath.Base(device) {
		return nil
	}
	if err := os.MkdirAll(linkDir, 0o755); err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	err := os.Symlink("../"+filepath.Base(device), path)
	if errors.Is(err, fs.ErrExist) { // by udev, meanwhile
		err = nil
	}
	return err
}

// remove forgets an attachment that is over. The lock's file stays: another may
// hold it.
func (f attachFiles) remove() error {
	var errs []error
	for _, path := range []string{f.path("json"), filepath.Join(linkDir, f.name)} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// listAttached returns what is attached on this machine, by name.
func listAttached(dir string) ([]attachView, error) {
	paths, err := filepath.Glob(filepath.Join(dir, "*.json"))
	if err != nil {
		return nil, err
	}
	sort.Strings(paths)
	views := []attachView{}
	for _, path := range paths {
		v, err := attachFiles{dir, strings.TrimSuffix(filepath.Base(path), ".json")}.view()
		switch {
		case isKind(err, block.NotFound):
		case err != nil:
			return nil, err
		default:
			views = append(views, v)
		}
	}
	return views, nil
}

func attachLs(c *console, dir *string) *cobra.Command {
	return &cobra.Command{
		Use: "ls", Short: "List the volumes that are attached on this machine", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			views, err := listAttached(*dir)
			if err != nil {
				return err
			}
			return c.print(views, func(w io.Writer) {
				fmt.Fprintln(w, "VOLUME\tDEVICE\tSIZE\tGATEWAY\tCONNECTIONS\tRECONNECTS\tNOTES")
				for _, v := range views {
					fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d/%d\t%d\t%s\n", v.Export, v.Device, formatSize(v.Bytes), v.Gateway, v.Live, v.Connections, v.Reconnects, v.notes())
				}
			})
		},
	}
}

func (v attachView) notes() string {
	if !v.Kept {
		return "no process keeps it: run `firn attach " + v.Export + "` again"
	}
	return orDash(v.Problem)
}

// attachUdev is for the shipped udev rule.
func attachUdev(c *console, dir *string) *cobra.Command {
	return &cobra.Command{
		Use: "udev DEVICE", Short: "Print the volume of a device for udev", Args: cobra.ExactArgs(1), Hidden: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			views, err := listAttached(*dir)
			if err != nil {
				return err
			}
			for _, v := range views {
				if filepath.Base(v.Device) == filepath.Base(args[0]) {
					fmt.Fprintf(c.out, "FIRN_VOLUME=%s\nFIRN_VOLUME_ID=%s\n", v.Export, v.Backend)
					return nil
				}
			}
			return block.Errorf(block.NotFound, "%s is not a volume of Firn", args[0])
		},
	}
}

// leaveTime is how long a detached device's process has to end.
const leaveTime = 10 * time.Second

// detachDevice ends the attachment of a volume on this machine, named by the
// volume or by the device. done is false if there is none, or if the volume was
// named, is in use here, and is to be taken from its gateway by force: then the
// device stays, and its process follows the volume.
func detachDevice(c *console, dir, named string, force bool) (done bool, err error) {
	views, err := listAttached(dir)
	if err != nil {
		return false, err
	}
	index, isDevice := attach.ParseDevice(named)
	isDevice = isDevice && strings.Contains(named, "/")
	found := -1
	for i, v := range views {
		if isDevice && v.Index == index || !isDevice && v.Export == named {
			found = i
		}
	}
	if found < 0 {
		if isDevice && attach.IsConnected(index) {
			return true, block.Errorf(block.NotFound, "%s is connected, but not by firn attach; `nbd-client -d %s` ends that", named, named)
		}
		if isDevice {
			return true, block.Errorf(block.NotFound, "%s is not attached", named)
		}
		return false, nil
	}
	v := views[found]
	if why, err := attach.InUse(v.Index); err != nil || why != "" {
		switch {
		case err != nil:
			return true, err
		case force && !isDevice:
			return false, nil
		case !force:
			return true, block.Errorf(block.Busy, "%s (volume %s) is %s; unmount it first, or give `firn detach %s --force`, which makes its requests fail", v.Device, v.Export, why, v.Device)
		}
	}
	files := attachFiles{dir, v.Export}
	if v.Kept {
		// Else its process would see connections that end, and make new ones.
		if err := syscall.Kill(v.PID, syscall.SIGTERM); err != nil {
			return true, fmt.Errorf("end the process %d that keeps %s: %w", v.PID, v.Device, err)
		}
	}
	if err := files.awaitRelease(); err != nil {
		return true, err
	}
	if err := attach.Disconnect(v.Index); err != nil {
		return true, err
	}
	if err := files.remove(); err != nil {
		return true, err
	}
	return true, c.print(v, func(w io.Writer) { fmt.Fprintf(w, "%s is detached from %s\n", v.Export, v.Device) })
}

// awaitRelease waits until no process keeps the device.
func (f attachFiles) awaitRelease() error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(leaveTime)
	for {
		lock, err := f.lock()
		if err == nil {
			return lock.Close()
		}
		if !isKind(err, block.Busy) {
			return err
		}
		select {
		case <-tick.C:
		case <-deadline:
			return block.Errorf(block.Busy, "the process that kept %s does not end", f.name)
		}
	}
}

// notifySystemd tells systemd, if that started the process (sd_notify(3)).
func notifySystemd(state string) error {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return nil
	}
	if strings.HasPrefix(path, "@") {
		path = "\x00" + path[1:]
	}
	conn, err := net.Dial("unixgram", path)
	if err != nil {
		return err
	}
	_, err = conn.Write([]byte(state))
	return errors.Join(err, conn.Close())
}

const armorEnv = "FIRN_ATTACH_ARMORED"

// armor makes this process one that the kernel can count on while it waits for
// the device: its memory is not swapped out or dropped, its own allocations do
// not wait for writes to the device, and it is the last to be killed for want of
// memory. What is not permitted is logged and left out.
//
// The mark for allocations is a thread's and is inherited, so the process sets
// it and starts itself again.
func armor() {
	if os.Getenv(armorEnv) == "" {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if err := unix.Prctl(unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0); err != nil {
			slog.Warn("allocations may wait for the device itself", "err", err)
		} else {
			err := syscall.Exec("/proc/self/exe", os.Args, append(os.Environ(), armorEnv+"=1"))
			slog.Warn("start anew", "err", err)
		}
	}
	if err := unix.Mlockall(unix.MCL_CURRENT); err != nil {
		slog.Warn("memory is not locked", "err", err)
	} else if err := unix.Mlockall(unix.MCL_FUTURE | unix.MCL_ONFAULT); err != nil {
		slog.Warn("memory to come is not locked", "err", err)
	}
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0); err != nil {
		slog.Warn("this process may be killed for want of memory", "err", err)
	}
}
