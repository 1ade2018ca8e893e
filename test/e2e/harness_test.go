package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// firnBinary is what TestMain built.
var firnBinary string

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	dir, err := os.MkdirTemp("", "firn-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	firnBinary = filepath.Join(dir, "firn")
	build := exec.Command("go", "build", "-o", firnBinary, "firn.io/firn/cmd/firn")
	build.Stderr = os.Stderr
	if err := build.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "build firn:", err)
		return 1
	}
	os.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin")
	return m.Run()
}

// patience bounds what a test waits for; far above what anything takes.
const patience = 90 * time.Second

// transcript collects what a process prints, and tells when it grows.
type transcript struct {
	mu    sync.Mutex
	text  bytes.Buffer
	grown chan struct{} // closed and replaced at each write and at the end
	ended bool
}

func newTranscript() *transcript { return &transcript{grown: make(chan struct{})} }

func (l *transcript) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text.Write(p)
	close(l.grown)
	l.grown = make(chan struct{})
	return len(p), nil
}

func (l *transcript) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ended = true
	close(l.grown)
	l.grown = make(chan struct{})
}

func (l *transcript) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// process is a running program in a group of its own.
type process struct {
	t      testing.TB
	name   string
	cmd    *exec.Cmd
	stdout *transcript
	stderr *transcript
	exited chan struct{} // closed when it has ended
	err    error         // of Wait, valid after exited
}

// launch starts a program. It is killed with its group when the test ends, and
// what it printed is shown if the test failed.
func launch(t testing.TB, name string, args ...string) *process {
	t.Helper()
	p := &process{t: t, name: filepath.Base(name), cmd: exec.Command(name, args...), stdout: newTranscript(), stderr: newTranscript(), exited: make(chan struct{})}
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	p.cmd.Stdout, p.cmd.Stderr = p.stdout, p.stderr
	if err := p.cmd.Start(); err != nil {
		t.Fatalf("start %s: %v", name, err)
	}
	go func() {
		p.err = p.cmd.Wait()
		p.stdout.end()
		p.stderr.end()
		close(p.exited)
	}()
	t.Cleanup(func() {
		p.kill()
		if t.Failed() {
			t.Logf("%s %s\nstdout:\n%s\nstderr:\n%s", p.name, strings.Join(args, " "), lastLines(p.stdout.String()), lastLines(p.stderr.String()))
		}
	})
	return p
}

func lastLines(s string) string {
	all := strings.Split(strings.TrimRight(s, "\n"), "\n")
	return strings.Join(all[max(0, len(all)-60):], "\n")
}

// kill ends the whole group with SIGKILL and waits.
func (p *process) kill() {
	syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
	<-p.exited
}

// stop asks the process to end and returns its error.
func (p *process) stop() error {
	p.t.Helper()
	p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.exited:
	case <-time.After(patience):
		p.t.Fatalf("%s did not stop on SIGTERM", p.name)
	}
	return p.err
}

// await returns once out contains text, or fails the test if the process ends
// or takes too long.
func (p *process) await(out *transcript, text string) string {
	p.t.Helper()
	deadline := time.After(patience)
	for {
		out.mu.Lock()
		s, grown, ended := out.text.String(), out.grown, out.ended
		out.mu.Unlock()
		if strings.Contains(s, text) {
			return s
		}
		if ended {
			p.t.Fatalf("%s ended without printing %q:\n%s%s", p.name, text, p.stdout, p.stderr)
		}
		select {
		case <-grown:
		case <-deadline:
			p.t.Fatalf("%s did not print %q:\n%s%s", p.name, text, p.stdout, p.stderr)
		}
	}
}

// result is what a finished program left.
type result struct {
	stdout, stderr string
	exit           int
}

// try runs a program to its end.
func try(t testing.TB, name string, args ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if cmd.ProcessState == nil {
		t.Fatalf("%s: %v", name, err)
	}
	return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// run is try for a program that must succeed; it returns its standard output.
func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	r := try(t, name, args...)
	if r.exit != 0 {
		t.Fatalf("%s %s: exit %d\n%s\n%s", name, strings.Join(args, " "), r.exit, r.stdout, r.stderr)
	}
	return r.stdout
}

// freeAddr returns a loopback address that nobody listens on now.
func freeAddr(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// serving is what a role prints with --json once it is ready.
type serving struct {
	Ready bool   `json:"ready"`
	NBD   string `json:"nbd"`
	API   string `json:"api"`
	HTTP  string `json:"http"`
}

// server is a running `firn up` or `firn gateway`.
type server struct {
	*process
	serving
	args []string
}

// up starts `firn up` on free ports and waits until it is ready.
func up(t testing.TB, dir string, args ...string) *server {
	t.Helper()
	args = append([]string{"up", "--json", "--data", dir, "--nbd", freeAddr(t), "--api", freeAddr(t), "--http", freeAddr(t)}, args...)
	return serve(t, args)
}

func serve(t testing.TB, args []string) *server {
	t.Helper()
	s := &server{process: launch(t, firnBinary, args...), args: args}
	s.await(s.stdout, "\n}\n")
	if err := json.Unmarshal([]byte(s.stdout.String()), &s.serving); err != nil || !s.Ready {
		t.Fatalf("firn %s printed %q: %v", args[0], s.stdout, err)
	}
	return s
}

// again starts the same command line anew, at once.
func (s *server) again() *server {
	s.t.Helper()
	return serve(s.t, s.args)
}

func (s *server) uri(volume string) string { return "nbd://" + s.NBD + "/" + volume }

// firn runs a command of the command line against s.
func (s *server) firn(args ...string) string {
	s.t.Helper()
	return run(s.t, firnBinary, append(args, "--api", s.API)...)
}

// image writes a file of n bytes: noise, with zeroed stretches in it, the same
// for the same seed.
func image(t testing.TB, path string, n int64, seed uint64) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(n); err != nil {
		t.Fatal(err)
	}
	noise := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	dice := rand.New(rand.NewPCG(seed, 0))
	for off := int64(0); off < n; {
		piece := min(n-off, (1+dice.Int64N(32))<<16)
		if dice.IntN(4) > 0 {
			if _, err := io.Copy(io.NewOffsetWriter(f, off), io.LimitReader(noise, piece)); err != nil {
				t.Fatal(err)
			}
		}
		off += piece
	}
}

func measured(t testing.TB, format string, args ...any) {
	t.Helper()
	t.Logf("measured: "+format, args...)
}
