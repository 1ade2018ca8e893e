// Package transporttest is the conformance suite of the transports.
package transporttest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"testing"
	"unsafe"

	"firn.io/firn/cluster/transport"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/payload"
)

// Env is one kind of transport under test.
type Env struct {
	// Network returns the network of a new role, and do, which runs a function
	// on the role's loop and returns when it has run.
	Network func(t testing.TB, name string, id transport.Identity) (n transport.Network, do func(func()))
	// Wait returns once cond holds, or false when it gave up. changed is
	// signalled whenever cond may have changed.
	Wait func(changed <-chan struct{}, cond func() bool) bool
	// Listen is an address to listen on; Nowhere is one where nobody listens.
	Listen, Nowhere string
}

// side is one role: its network and all that happened to it.
type side struct {
	t    testing.TB
	env  *Env
	net  transport.Network
	do   func(func())
	echo bool // answer every message to its sender

	mu      sync.Mutex
	got     []transport.Message
	from    []transport.Peer
	hellos  []transport.Hello
	closed  []error
	changed chan struct{}
}

var cluster = block.ClusterID{1, 2, 3}

func newSide(t testing.TB, env *Env, name string, id transport.Identity) *side {
	s := &side{t: t, env: env, changed: make(chan struct{}, 1)}
	s.net, s.do = env.Network(t, name, id)
	return s
}

func (s *side) Receive(p transport.Peer, m transport.Message) {
	s.mu.Lock()
	if m.Type == transport.TypeHello {
		h, err := transport.DecodeHello(m.Header)
		if err != nil {
			s.t.Error(err)
		}
		s.hellos = append(s.hellos, h)
	} else {
		s.got, s.from = append(s.got, m), append(s.from, p)
	}
	s.mu.Unlock()
	if s.echo && m.Type != transport.TypeHello {
		p.Send(transport.Data, transport.Message{Type: transport.TypeResponse, Header: bytes.Clone(m.Header)})
	}
	s.signal()
}

func (s *side) Closed(_ transport.Peer, err error) {
	s.mu.Lock()
	s.closed = append(s.closed, err)
	s.mu.Unlock()
	s.signal()
}

func (s *side) signal() {
	select {
	case s.changed <- struct{}{}:
	default:
	}
}

func (s *side) wait(what string, cond func() bool) {
	s.t.Helper()
	if !s.env.Wait(s.changed, func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return cond()
	}) {
		s.t.Fatalf("%s: it did not happen; %d messages, closed %v", what, len(s.got), s.closed)
	}
}

func (s *side) listen(addr string) (string, func()) {
	s.t.Helper()
	var bound string
	var stop func()
	var err error
	s.do(func() { bound, stop, err = s.net.Listen(context.Background(), addr, s) })
	if err != nil {
		s.t.Fatal(err)
	}
	return bound, stop
}

func (s *side) dial(addr string) (p transport.Peer) {
	s.do(func() { p = s.net.Dial(context.Background(), addr, s) })
	return p
}

func (s *side) send(p transport.Peer, c transport.Class, m transport.Message) (ok bool) {
	s.do(func() { ok = p.Send(c, m) })
	return ok
}

// message number n, with payloads of the sizes given.
func message(n int, sizes ...int) transport.Message {
	m := transport.Message{Type: transport.TypeRequest, Header: binary.LittleEndian.AppendUint64(nil, uint64(n))}
	for i, size := range sizes {
		p := payload.New(size)
		fill(p.Bytes(), n, i)
		m.Payloads = append(m.Payloads, p)
	}
	return m
}

func fill(b []byte, n, i int) {
	for j := range b {
		b[j] = byte(n*31 + i*7 + j>>8 + j)
	}
}

func check(t testing.TB, m transport.Message, n int, sizes ...int) {
	t.Helper()
	if m.Type != transport.TypeRequest || len(m.Header) != 8 || int(binary.LittleEndian.Uint64(m.Header)) != n {
		t.Fatalf("got a message of type %d, header %x, want number %d", m.Type, m.Header, n)
	}
	if len(m.Payloads) != len(sizes) {
		t.Fatalf("message %d has %d payloads, want %d", n, len(m.Payloads), len(sizes))
	}
	for i, p := range m.Payloads {
		want := make([]byte, sizes[i])
		fill(want, n, i)
		if !bytes.Equal(p.Bytes(), want) {
			t.Fatalf("payload %d of message %d (%d bytes) is not what was sent", i, n, p.Len())
		}
		if p.Len() > 0 && uintptr(unsafe.Pointer(&p.Bytes()[0]))%payload.Align != 0 {
			t.Errorf("payload %d of message %d is not aligned", i, n)
		}
	}
}

func identity(node block.NodeID) transport.Identity {
	return transport.Identity{Hello: transport.Hello{Cluster: cluster, Node: node, Session: uint64(node) * 100}}
}

// Run runs the suite.
func Run(t *testing.T, env *Env) {
	for name, f := range map[string]func(*testing.T, *Env){
		"Order": order, "Payloads": payloads, "Answers": answers, "Hello": hello, "Refused": refused,
		"Nowhere": nowhere, "Reconnect": reconnect, "Close": closing, "Limits": limits, "Stop": stopping,
	} {
		t.Run(name, func(t *testing.T) { f(t, env) })
	}
}

func order(t *testing.T, env *Env) {
	a, b := newSide(t, env, "a", identity(1)), newSide(t, env, "b", identity(2))
	addr, stop := b.listen(env.Listen)
	defer stop()
	p := a.dial(addr)
	const n = 3000
	for i := 0; i < n; i += 100 {
		a.do(func() {
			for j := i; j < i+100; j++ {
				if c := transport.Class(j % 2); !p.Send(c, message(j*2+int(c))) {
					t.Error("Send refused")
				}
			}
		})
	}
	b.wait("all messages", func() bool { return len(b.got) == n })
	last := map[int]int{}
	for _, m := range b.got {
		v := int(binary.LittleEndian.Uint64(m.Header))
		if v <= last[v%2] && last[v%2] != 0 {
			t.Fatalf("class %d: number %d after %d", v%2, v, last[v%2])
		}
		last[v%2] = v
	}
	if q := p.QueuedBytes(); q != 0 {
		a.wait("an empty queue", func() bool { a.signal(); return p.QueuedBytes() == 0 })
	}
}

func payloads(t *testing.T, env *Env) {
	a, b := newSide(t, env, "a", identity(1)), newSide(t, env, "b", identity(2))
	addr, stop := b.listen(env.Listen)
	defer stop()
	p := a.dial(addr)
	sizes := [][]int{{}, {1}, {0, 4096}, {1024, 1025, 4096, 4097}, {1 << 20}, {512 << 10, 4096, 3}, {1 << 20, 1 << 20}}
	for round := range 5 {
		a.do(func() {
			for i, s := range sizes {
				if !p.Send(transport.Data, message(round*len(sizes)+i, s...)) {
					t.Error("Send refused")
				}
			}
		})
	}
	b.wait("all messages", func() bool { return len(b.got) == 5*len(sizes) })
	for i, m := range b.got {
		check(t, m, i, sizes[i%len(sizes)]...)
		m.Release()
	}
}

func answers(t *testing.T, env *Env) {
	a, b := newSide(t, env, "a", identity(1)), newSide(t, env, "b", identity(2))
	b.echo = true
	addr, stop := b.listen(env.Listen)
	defer stop()
	p := a.dial(addr)
	for i := range 50 {
		a.send(p, transport.Class(i%2), message(i, 4096))
	}
	a.wait("the answers", func() bool { return len(a.got) == 50 })
	for i := range a.from {
		if a.from[i] != p {
			t.Fatal("an answer came from another peer than the one dialled")
		}
	}
	for i := range b.from {
		if b.from[i] != b.from[0] {
			t.Fatal("one dialled peer is two accepted ones")
		}
	}
}

func hello(t *testing.T, env *Env) {
	a, b := newSide(t, env, "a", identity(7)), newSide(t, env, "b", identity(2))
	addr, stop := b.listen(env.Listen)
	defer stop()
	a.send(a.dial(addr), transport.Control, message(1))
	b.wait("the message", func() bool { return len(b.got) == 1 })
	if len(b.hellos) != 1 || b.hellos[0] != identity(7).Hello {
		t.Fatalf("hellos %v", b.hellos)
	}
}

func refused(t *testing.T, env *Env) {
	other := identity(1)
	other.Hello.Cluster = block.ClusterID{9}
	a, b := newSide(t, env, "a", other), newSide(t, env, "b", identity(2))
	addr, stop := b.listen(env.Listen)
	defer stop()
	a.send(a.dial(addr), transport.Data, message(1, 4096))
	a.wait("a refusal", func() bool { return len(a.closed) > 0 })
	if !errors.Is(a.closed[0], block.Denied) {
		t.Fatalf("refused with %v, want kind denied", a.closed[0])
	}
	if len(b.got)+len(b.hellos) > 0 {
		t.Fatal("a peer of another cluster was heard")
	}
}

func nowhere(t *testing.T, env *Env) {
	a := newSide(t, env, "a", identity(1))
	p := a.dial(env.Nowhere)
	if !a.send(p, transport.Data, message(1, 4096)) {
		t.Fatal("the first Send was refused")
	}
	a.wait("the news that nobody is there", func() bool { return len(a.closed) > 0 })
	if !errors.Is(a.closed[0], block.Unavailable) {
		t.Fatalf("%v, want kind unavailable", a.closed[0])
	}
	if q := p.QueuedBytes(); q != 0 {
		t.Fatalf("%d bytes queued after the loss", q)
	}
}

func reconnect(t *testing.T, env *Env) {
	a, b := newSide(t, env, "a", identity(1)), newSide(t, env, "b", identity(2))
	addr, stop := b.listen(env.Listen)
	p := a.dial(addr)
	a.send(p, transport.Data, message(1))
	b.wait("the first message", func() bool { return len(b.got) == 1 })
	stop()
	a.wait("the loss", func() bool { return len(a.closed) > 0 })
	addr2, stop2 := b.listen(addr)
	defer stop2()
	if addr2 != addr {
		t.Fatalf("bound %s, want %s", addr2, addr)
	}
	n := 1
	b.wait("a message after the loss", func() bool {
		b.mu.Unlock()
		n++
		a.send(p, transport.Data, message(n))
		b.signal()
		b.mu.Lock()
		return len(b.got) > 1
	})
	if len(b.hellos) != 2 {
		t.Errorf("%d hellos on two connections", len(b.hellos))
	}
}

func closing(t *testing.T, env *Env) {
	a, b := newSide(t, env, "a", identity(1)), newSide(t, env, "b", identity(2))
	addr, stop := b.listen(env.Listen)
	defer stop()
	p := a.dial(addr)
	a.send(p, transport.Data, message(1))
	b.wait("the message", func() bool { return len(b.got) == 1 })
	b.do(func() { b.from[0].Close() })
	a.wait("the loss", func() bool { return len(a.closed) == 1 })
	if b.send(b.from[0], transport.Data, message(2, 4096)) {
		t.Error("a closed peer took a message")
	}
	p2 := a.dial(addr)
	a.send(p2, transport.Data, message(3))
	b.wait("the message", func() bool { return len(b.got) == 2 })
	a.do(p2.Close)
	b.wait("the loss", func() bool { return len(b.closed) == 1 })
	if a.send(p2, transport.Data, message(4)) {
		t.Error("a closed peer took a message")
	}
}

func limits(t *testing.T, env *Env) {
	a := newSide(t, env, "a", identity(1))
	p := a.dial(env.Nowhere)
	sent := 0
	a.do(func() {
		for p.Send(transport.Data, message(1, 1<<20)) {
			if sent++; sent > 100 {
				t.Error("the queue has no limit")
				return
			}
		}
	})
	if sent < transport.MaxQueueBytes>>20-1 {
		t.Errorf("the queue took %d MiB, its limit is %d", sent, transport.MaxQueueBytes>>20)
	}
	a.wait("the loss", func() bool { return len(a.closed) > 0 })
}

func stopping(t *testing.T, env *Env) {
	a, b := newSide(t, env, "a", identity(1)), newSide(t, env, "b", identity(2))
	addr, stop := b.listen(env.Listen)
	p := a.dial(addr)
	a.send(p, transport.Data, message(1))
	b.wait("the message", func() bool { return len(b.got) == 1 })
	stop()
	a.wait("the loss", func() bool { return len(a.closed) > 0 })
	// The address is free again.
	_, stop = b.listen(addr)
	stop()
	_ = fmt.Sprint(p.Addr())
}
