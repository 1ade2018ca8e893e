package attach

import (
	"context"
	"io"
	"net"
	"sync"
	"testing"

	"firn.io/firn/internal/block/blocktest"
)

// gate passes connections on to a server until it is shut; then the ones that
// are there stay, and new ones get no answer.
type gate struct {
	mu   sync.Mutex
	shut bool
	all  []net.Conn
	over sync.WaitGroup
}

func (g *gate) serve(l net.Listener, to string) {
	for {
		in, err := l.Accept()
		if err != nil {
			return
		}
		g.mu.Lock()
		g.all = append(g.all, in)
		if g.shut {
			g.mu.Unlock()
			continue
		}
		out, err := net.Dial("tcp", to)
		if err != nil {
			in.Close()
		} else {
			g.all = append(g.all, out)
			g.over.Go(func() { io.Copy(in, out); in.Close() })
			g.over.Go(func() { io.Copy(out, in); out.Close() })
		}
		g.mu.Unlock()
	}
}

func openGate(t *testing.T, to string) (addr string, shut func()) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := &gate{}
	g.over.Go(func() { g.serve(l, to) })
	t.Cleanup(func() {
		l.Close()
		g.mu.Lock()
		for _, nc := range g.all {
			nc.Close()
		}
		g.mu.Unlock()
		g.over.Wait()
	})
	return l.Addr().String(), func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.shut = true
	}
}

// TestLeavesServerThatAnswersNobody: its connections are as good as ever, so only
// asking tells.
func TestLeavesServerThatAnswersNobody(t *testing.T) {
	t.Parallel()
	volume := blocktest.New(blocktest.Options{Name: "v", Bytes: 1 << 20})
	behind, _ := serve(t, volume)
	a, shut := openGate(t, behind)
	b, _ := serve(t, volume)
	k := &driver{dead: make(chan int)}
	changes := make(chan Status, 64)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	d, err := Attach(ctx, Config{Export: "v", Gateways: []string{a, b}, Kernel: k, Index: -1, Changed: func(s Status) { changes <- s }})
	if err != nil {
		t.Fatal(err)
	}
	ran := make(chan error, 1)
	begin := d.cfg.Clock.Now()
	go func() { ran <- d.Run(ctx) }()
	shut()
	for s := range changes {
		if s.Moves == 1 {
			if s.Gateway != b {
				t.Errorf("moved to %s, want %s", s.Gateway, b)
			}
			break
		}
	}
	if took := d.cfg.Clock.Now().Sub(begin); took < stuckTime {
		t.Errorf("left after %v already", took)
	}
	cancel()
	<-ran
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}
