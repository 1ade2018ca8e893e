package metatest

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"firn.io/firn/cluster/meta"
)

// startTries is how often StartEtcd draws new ports: another process may take
// one between the choice and its use.
const startTries = 4

// Etcd is a real etcd server of one member, as an own process.
type Etcd struct {
	// Endpoint is where clients connect.
	Endpoint string

	dir, peer string
	cmd       *exec.Cmd
	ended     chan struct{}
	output    lockedBuffer
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// StartEtcd starts the stock etcd binary on free ports, in a folder of the test,
// and stops it at the test's end. Without the binary the test fails.
func StartEtcd(t testing.TB) *Etcd {
	t.Helper()
	if _, err := exec.LookPath("etcd"); err != nil {
		t.Fatalf("this test runs a real etcd and found none: install the package etcd-server (%v)", err)
	}
	e := &Etcd{dir: filepath.Join(t.TempDir(), "etcd")}
	t.Cleanup(e.Kill)
	for range startTries {
		e.Endpoint, e.peer = "http://"+freePort(t), "http://"+freePort(t)
		if e.start(t) {
			return e
		}
	}
	t.Fatalf("etcd did not start; it said:\n%s", e.output.String())
	return nil
}

// Restart starts the server again after Kill, on the same folder and ports.
func (e *Etcd) Restart(t testing.TB) {
	t.Helper()
	if !e.start(t) {
		t.Fatalf("etcd did not start again; it said:\n%s", e.output.String())
	}
}

// Kill ends the server at once, as kill -9 does.
func (e *Etcd) Kill() {
	if e.cmd != nil {
		// The process may have ended by itself; what counts is that it has ended.
		_ = e.cmd.Process.Kill()
		<-e.ended
		e.cmd = nil
	}
}

func (e *Etcd) start(t testing.TB) bool {
	t.Helper()
	cmd := exec.Command("etcd", "--name", "test", "--data-dir", e.dir,
		"--listen-client-urls", e.Endpoint, "--advertise-client-urls", e.Endpoint,
		"--listen-peer-urls", e.peer, "--initial-advertise-peer-urls", e.peer, "--initial-cluster", "test="+e.peer,
		"--auto-compaction-mode", "periodic", "--auto-compaction-retention", "1h")
	cmd.Stdout, cmd.Stderr = &e.output, &e.output
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	ended := make(chan struct{})
	e.cmd, e.ended = cmd, ended
	go func() {
		// Its exit status says nothing that its output does not.
		_ = cmd.Wait()
		close(ended)
		cancel()
	}()
	s, err := meta.OpenEtcd(ctx, meta.EtcdConfig{Endpoints: []string{e.Endpoint}})
	if err != nil {
		e.Kill()
		fmt.Fprintf(&e.output, "%v\n", err)
		return false
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return true
}

func freePort(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}
