package transporttest

import (
	"context"
	"syscall"
	"testing"
	"time"

	"firn.io/firn/cluster/transport"
	"firn.io/firn/internal/clock"
	"firn.io/firn/internal/loop"
	"firn.io/firn/internal/payload"
)

// WaitReal returns an Env.Wait for loops of real time. The limit is only
// reached by a test that fails.
func WaitReal(limit time.Duration) func(<-chan struct{}, func() bool) bool {
	return func(changed <-chan struct{}, cond func() bool) bool {
		late := time.NewTimer(limit)
		defer late.Stop()
		for !cond() {
			select {
			case <-changed:
			case <-late.C:
				return cond()
			}
		}
		return true
	}
}

// Benchmark sends requests with a payload from one loop to another, which
// answers each, batched by the turns of the loops, and reports the CPU time of
// both ends per operation.
func Benchmark(b *testing.B, network func(name string, l loop.Loop) transport.Network, listen string) {
	for _, c := range []struct {
		name         string
		bytes, depth int
	}{{"4KiB/depth=1", 4096, 1}, {"4KiB/depth=32", 4096, 32}, {"4KiB/depth=256", 4096, 256}, {"64KiB/depth=32", 64 << 10, 32}, {"1MiB/depth=8", 1 << 20, 8}} {
		b.Run(c.name, func(b *testing.B) { benchmark(b, network, listen, c.bytes, c.depth) })
	}
}

func benchmark(b *testing.B, network func(string, loop.Loop) transport.Network, listen string, bytes, depth int) {
	la, lb := loop.NewSystem(clock.System{}, loop.DefaultLimits), loop.NewSystem(clock.System{}, loop.DefaultLimits)
	defer la.Stop()
	defer lb.Stop()
	na, nb := network("a", la), network("b", lb)
	var addr string
	var stop func()
	var err error
	lb.Call(func() { addr, stop, err = nb.Listen(context.Background(), listen, server{}) })
	if err != nil {
		b.Fatal(err)
	}
	defer stop()
	done := make(chan struct{}) // closed when all answers are in
	cl := &client{left: b.N, toSend: b.N, bytes: bytes, done: done}
	la.Call(func() { cl.peer = na.Dial(context.Background(), addr, cl) })
	b.ReportAllocs()
	b.SetBytes(int64(bytes))
	cpu := cpuTime()
	b.ResetTimer()
	la.Call(func() {
		for range depth {
			cl.send()
		}
	})
	<-done
	b.StopTimer()
	b.ReportMetric(float64(cpuTime()-cpu)/float64(b.N)/1e3, "cpu-us/op")
}

// cpuTime is what this process has used, in nanoseconds.
func cpuTime() int64 {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return u.Utime.Nano() + u.Stime.Nano()
}

type server struct{}

func (server) Receive(p transport.Peer, m transport.Message) {
	m.Release()
	if m.Type != transport.TypeHello {
		p.Send(transport.Data, transport.Message{Type: transport.TypeResponse, Header: m.Header})
	}
}
func (server) Closed(transport.Peer, error) {}

type client struct {
	peer         transport.Peer
	left, toSend int
	bytes        int
	done         chan struct{}
}

func (c *client) send() {
	if c.toSend == 0 {
		return
	}
	c.toSend--
	c.peer.Send(transport.Data, transport.Message{Type: transport.TypeRequest, Header: make([]byte, 160), Payloads: []*payload.Buf{payload.New(c.bytes)}})
}

func (c *client) Receive(_ transport.Peer, m transport.Message) {
	m.Release()
	c.send()
	if c.left--; c.left == 0 {
		close(c.done)
	}
}
func (c *client) Closed(transport.Peer, error) {}
