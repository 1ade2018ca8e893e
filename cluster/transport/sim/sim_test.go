package sim_test

import (
	"testing"
	"time"

	"firn.io/firn/cluster/transport"
	"firn.io/firn/cluster/transport/sim"
	"firn.io/firn/cluster/transport/transporttest"
	"firn.io/firn/internal/loop"
)

func TestConformance(t *testing.T) {
	w := loop.NewWorld(1)
	net := sim.New(w)
	transporttest.Run(t, &transporttest.Env{
		Network: func(_ testing.TB, name string, id transport.Identity) (transport.Network, func(func())) {
			l := w.NewLoop(nil)
			return net.Network(name, l, id), func(fn func()) {
				ran := false
				l.Post(func() { fn(); ran = true })
				for !ran && w.Step() {
				}
			}
		},
		Wait: func(_ <-chan struct{}, cond func() bool) bool {
			return w.RunUntil(10*time.Second, cond)
		},
		Listen: ":0", Nowhere: "nowhere",
	})
}

// A cut loses what is sent, silently; the connection goes on after it.
func TestCutIsSilentAndOneWay(t *testing.T) {
	w := loop.NewWorld(2)
	net := sim.New(w)
	a, b := &counter{}, &counter{}
	la, lb := w.NewLoop(nil), w.NewLoop(nil)
	na, nb := net.Network("a", la, transport.Identity{}), net.Network("b", lb, transport.Identity{})
	if _, _, err := nb.Listen(t.Context(), "b", b); err != nil {
		t.Fatal(err)
	}
	p := na.Dial(t.Context(), "b", a)
	send := func() {
		la.Post(func() { p.Send(transport.Data, transport.Message{Type: transport.TypeRequest}) })
		w.RunFor(time.Second)
	}
	send()
	net.Cut("a", "b")
	send()
	net.Heal("a", "b")
	send()
	if b.got != 2 || a.closed+b.closed != 0 {
		t.Fatalf("%d messages arrived, %d losses seen", b.got, a.closed+b.closed)
	}
	net.Crash("b")
	lb.Kill()
	send()
	if a.closed == 0 {
		t.Fatal("a crash of the other side was not noticed")
	}
}

type counter struct{ got, closed int }

func (c *counter) Receive(_ transport.Peer, m transport.Message) {
	if m.Type != transport.TypeHello {
		c.got++
	}
}
func (c *counter) Closed(transport.Peer, error) { c.closed++ }

// A request comes a second time, and also when its sender is dead.
func TestRepeatsOutliveTheConnection(t *testing.T) {
	w := loop.NewWorld(3)
	net := sim.New(w)
	a, b := &counter{}, &counter{}
	la, lb := w.NewLoop(nil), w.NewLoop(nil)
	na, nb := net.Network("a", la, transport.Identity{}), net.Network("b", lb, transport.Identity{})
	if _, _, err := nb.Listen(t.Context(), "b", b); err != nil {
		t.Fatal(err)
	}
	net.SetFaults(sim.Faults{RepeatPerMille: 1000, RepeatDelay: 8 * time.Second})
	p := na.Dial(t.Context(), "b", a)
	la.Post(func() { p.Send(transport.Data, transport.Message{Type: transport.TypeRequest}) })
	w.RunFor(100 * time.Millisecond)
	if b.got != 1 {
		t.Fatalf("%d messages arrived, the copy is due later", b.got)
	}
	net.Crash("a")
	la.Kill()
	w.RunFor(8 * time.Second)
	if b.got != 2 || net.Repeated() != 1 || b.closed != 1 {
		t.Fatalf("%d messages arrived, %d repeated, %d losses seen", b.got, net.Repeated(), b.closed)
	}
}
