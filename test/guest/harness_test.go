package guest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// firnBinary is what TestMain built, without C so that it runs in the guest.
var firnBinary string

// long tells whether the long variants run.
var long = os.Getenv("FIRN_TEST_LONG") == "1"

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	dir, err := os.MkdirTemp("", "firn-guest-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	firnBinary = filepath.Join(dir, "firn")
	build := exec.Command("go", "build", "-o", firnBinary, "firn.io/firn/cmd/firn")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	build.Stderr = os.Stderr
	if err := build.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "build firn:", err)
		return 1
	}
	return m.Run()
}

// printed is what a process has printed so far; grown is closed when it grows.
type printed struct {
	mu    sync.Mutex
	text  bytes.Buffer
	grown chan struct{}
}

func (p *printed) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.text.Write(b)
	close(p.grown)
	p.grown = make(chan struct{})
	return len(b), nil
}

func (p *printed) now() (string, chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.text.String(), p.grown
}

// role is a running firn process on the host, or another server.
type role struct {
	t      testing.TB
	args   []string
	cmd    *exec.Cmd
	out    *printed
	err    *printed
	exited chan struct{}
	NBD    string `json:"nbd"`
	API    string `json:"api"`
}

// launch starts a program that the test ends.
func launch(t testing.TB, program string, args ...string) *role {
	t.Helper()
	r := &role{t: t, args: args, cmd: exec.Command(program, args...), exited: make(chan struct{}),
		out: &printed{grown: make(chan struct{})}, err: &printed{grown: make(chan struct{})}}
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	r.cmd.Stdout, r.cmd.Stderr = r.out, r.err
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // whose death signal it is
		err := r.cmd.Start()
		started <- err
		if err == nil {
			r.cmd.Wait()
			close(r.exited)
		}
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		r.kill()
		if t.Failed() {
			text, _ := r.err.now()
			lines := strings.Split(strings.TrimSpace(text), "\n")
			t.Logf("%s %s:\n%s", program, strings.Join(args, " "), strings.Join(lines[max(0, len(lines)-40):], "\n"))
		}
	})
	return r
}

// firn starts a role of firn and waits until it is ready.
func firn(t testing.TB, args ...string) *role {
	t.Helper()
	r := launch(t, firnBinary, args...)
	r.awaitReady()
	return r
}

func (r *role) awaitReady() {
	r.t.Helper()
	deadline := time.After(quiet)
	for {
		text, grown := r.out.now()
		if strings.Contains(text, "\n}\n") {
			if err := json.Unmarshal([]byte(text), r); err != nil {
				r.t.Fatalf("%v printed %q: %v", r.args, text, err)
			}
			return
		}
		select {
		case <-grown:
		case <-r.exited:
			text, _ := r.err.now()
			r.t.Fatalf("%v ended:\n%s", r.args, text)
		case <-deadline:
			r.t.Fatalf("%v is not ready", r.args)
		}
	}
}

// kill ends it as kill -9 does.
func (r *role) kill() {
	syscall.Kill(-r.cmd.Process.Pid, syscall.SIGKILL)
	<-r.exited
}

// signal sends a signal to it.
func (r *role) signal(s syscall.Signal) {
	r.t.Helper()
	if err := r.cmd.Process.Signal(s); err != nil {
		r.t.Fatal(err)
	}
}

// again starts the same command line anew.
func (r *role) again() *role {
	r.t.Helper()
	return firn(r.t, r.args...)
}

// guestAddr is the NBD address as the guest sees it.
func (r *role) guestAddr() string {
	r.t.Helper()
	_, port, err := net.SplitHostPort(r.NBD)
	if err != nil {
		r.t.Fatal(err)
	}
	return HostAddr + ":" + port
}

func freeAddr(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// up starts `firn up` with free ports.
func up(t testing.TB, args ...string) *role {
	t.Helper()
	return firn(t, append([]string{"up", "--json", "--data", t.TempDir(), "--nbd", freeAddr(t), "--api", freeAddr(t), "--http", ""}, args...)...)
}

// command runs firn on the host.
func (r *role) command(args ...string) string {
	r.t.Helper()
	out, err := exec.Command(firnBinary, append(args, "--api", r.API)...).CombinedOutput()
	if err != nil {
		r.t.Fatalf("firn %v: %v\n%s", args, err, out)
	}
	return string(out)
}

func measured(t testing.TB, format string, args ...any) {
	t.Helper()
	t.Logf("measured: "+format, args...)
}

// storageGuest is what the NBD tests use.
func storageGuest(t testing.TB, cfg Config) *Guest {
	t.Helper()
	cfg.Programs = append(cfg.Programs, "nbd-client", "mkfs.ext4", "e2fsck", "resize2fs", "mkfs.xfs", "xfs_repair", "xfs_growfs", "fio", "blkdiscard", "fstrim", "findmnt")
	if cfg.Files == nil {
		cfg.Files = map[string]string{}
	}
	cfg.Files["/bin/firn"] = firnBinary
	cfg.Modules = append(cfg.Modules, "nbd", "xfs")
	g := Boot(t, cfg)
	g.Run("modprobe xfs")
	return g
}
