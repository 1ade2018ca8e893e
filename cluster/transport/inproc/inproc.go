// Package inproc is the transport between the roles of one process: messages
// go from loop to loop by reference, headers and payloads uncopied. How they
// travel is a Carrier, so that the simulator's network is the same code under
// another carrier.
package inproc

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"firn.io/firn/cluster/transport"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/loop"
)

// Carrier brings what one end sent to the loop of the other.
type Carrier interface {
	// Connect opens a route for a new connection; nil when the two ends cannot
	// reach each other now.
	Connect(from, to *Network, r Resets) Route
}

// Resets let a carrier end a connection as a reset does. Each belongs on the
// loop of its side, and may come too late or twice.
type Resets struct {
	Dialler, Accepter func()
}

// Route is one connection's way, in one direction per call. Calls with one
// destination and class run in their order, or not at all.
type Route interface {
	// Carry runs deliver on the loop of network to, or drop (anywhere, at any
	// time) if it gets lost. urgent is for opening and closing: it is ordered
	// before all that follows and never lost on its own.
	Carry(to *Network, c transport.Class, bytes int, urgent bool, deliver, drop func())
}

// Duplicator is a Route on which what was sent may come a second time, later and
// past the end of the connection: what a client sent again on another
// connection, while its first attempt still lay unread in a socket.
type Duplicator interface {
	// Late returns how to carry the second copy; nil: there is none.
	Late(to *Network, c transport.Class) (carry func(deliver, drop func()))
}

// Fabric is the set of addresses that networks of one process can reach.
type Fabric struct {
	carrier Carrier

	mu struct {
		sync.Mutex
		listeners map[string]*listener
		ports     int
	}
}

// NewFabric returns an empty fabric. A nil carrier delivers at once.
func NewFabric(c Carrier) *Fabric {
	if c == nil {
		c = direct{}
	}
	f := &Fabric{carrier: c}
	f.mu.listeners = make(map[string]*listener)
	return f
}

type direct struct{}

func (direct) Connect(_, _ *Network, _ Resets) Route { return direct{} }

func (direct) Carry(to *Network, _ transport.Class, _ int, _ bool, deliver, _ func()) {
	to.loop.Post(deliver)
}

// Network is one role's part of the fabric. It implements transport.Network.
type Network struct {
	fabric *Fabric
	loop   loop.Loop
	id     transport.Identity
	name   string
}

// Network returns a network for the role that runs on l. name is for carriers
// and logs.
func (f *Fabric) Network(name string, l loop.Loop, id transport.Identity) *Network {
	return &Network{fabric: f, loop: l, id: id, name: name}
}

// Name returns the name given to Fabric.Network.
func (n *Network) Name() string { return n.name }

// Loop returns the network's loop.
func (n *Network) Loop() loop.Loop { return n.loop }

type listener struct {
	net     *Network
	addr    string
	h       transport.Handler
	stopped bool   // on the loop
	ends    []*end // accepted, on the loop
}

// Listen implements transport.Network. An address without a port, or with port
// 0, gets one.
func (n *Network) Listen(_ context.Context, addr string, h transport.Handler) (string, func(), error) {
	f := n.fabric
	f.mu.Lock()
	defer f.mu.Unlock()
	bound := addr
	if l := len(addr); l == 0 || l >= 2 && addr[l-2:] == ":0" {
		f.mu.ports++
		bound = fmt.Sprintf("%s%d", addr, f.mu.ports)
	}
	if f.mu.listeners[bound] != nil {
		return "", nil, block.Errorf(block.Busy, "listen on %s: the address is in use", bound)
	}
	l := &listener{net: n, addr: bound, h: h}
	f.mu.listeners[bound] = l
	return bound, func() {
		f.mu.Lock()
		if f.mu.listeners[bound] == l {
			delete(f.mu.listeners, bound)
		}
		f.mu.Unlock()
		n.loop.Post(l.stop)
	}, nil
}

func (l *listener) stop() {
	l.stopped = true
	ends := l.ends
	l.ends = nil
	for _, e := range ends {
		e.shut(nil)
	}
}

// Remove takes the listeners of a network away without a trace, as a crash of
// its process does.
func (f *Fabric) Remove(n *Network) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for addr, l := range f.mu.listeners {
		if l.net == n {
			delete(f.mu.listeners, addr)
		}
	}
}

// Dial implements transport.Network.
func (n *Network) Dial(ctx context.Context, addr string, h transport.Handler) transport.Peer {
	return &end{net: n, h: h, addr: addr, ctx: ctx, dialled: true}
}

// conn joins two ends. Each field is used on the loop of the end it names.
type conn struct {
	route    Route
	dialled  *end
	accepted *end
}

// end is one side of a connection. All but queued is used on its loop.
type end struct {
	net     *Network
	h       transport.Handler
	addr    string
	ctx     context.Context // the dialler's; nil for an accepted end
	dialled bool
	owner   *listener // of an accepted end

	conn   *conn // nil while not connected
	out    [2][]transport.Message
	due    bool // a flush is due at the end of the turn
	closed bool
	queued atomic.Int64 // bytes sent and not delivered
}

// Addr implements transport.Peer.
func (e *end) Addr() string { return e.addr }

// QueuedBytes implements transport.Peer.
func (e *end) QueuedBytes() int { return int(e.queued.Load()) }

// Send implements transport.Peer.
func (e *end) Send(c transport.Class, m transport.Message) bool {
	n := int64(m.Bytes())
	if e.closed || e.ctx != nil && e.ctx.Err() != nil || e.queued.Load()+n > transport.MaxQueueBytes {
		m.Release()
		return false
	}
	e.queued.Add(n)
	e.out[c] = append(e.out[c], m)
	if !e.due {
		e.due = true
		e.net.loop.Defer(e.flush)
	}
	return true
}

func (e *end) flush() {
	e.due = false
	if e.closed {
		e.drop()
		return
	}
	if e.conn == nil && !e.connect() {
		return
	}
	c := e.conn
	for class, ms := range e.out {
		if len(ms) == 0 {
			continue
		}
		e.out[class] = nil
		bytes := 0
		for i := range ms {
			bytes += ms[i].Bytes()
		}
		sent := func() { e.queued.Add(-int64(bytes)) }
		release := func() {
			sent()
			for i := range ms {
				ms[i].Release()
			}
		}
		peer := c.far(e)
		if d, ok := c.route.(Duplicator); ok {
			c.repeat(d, peer, transport.Class(class), ms)
		}
		c.route.Carry(peer.net, transport.Class(class), bytes, false, func() {
			if peer.conn != c || peer.closed {
				release()
				return
			}
			sent()
			for i := range ms {
				if peer.closed {
					ms[i].Release()
					continue
				}
				peer.h.Receive(peer, ms[i])
			}
		}, release)
	}
}

// repeat carries copies of the requests among ms late. Who accepted them answers
// into nothing once the connection is gone.
func (c *conn) repeat(d Duplicator, peer *end, class transport.Class, ms []transport.Message) {
	if peer.dialled {
		return
	}
	carry := d.Late(peer.net, class)
	if carry == nil {
		return
	}
	var copies []transport.Message
	for _, m := range ms {
		if m.Type != transport.TypeRequest {
			continue
		}
		m.Header = bytes.Clone(m.Header)
		m.Payloads = slices.Clone(m.Payloads)
		for _, p := range m.Payloads {
			p.Retain()
		}
		copies = append(copies, m)
	}
	release := func() {
		for i := range copies {
			copies[i].Release()
		}
	}
	carry(func() {
		for _, m := range copies {
			peer.h.Receive(peer, m)
		}
	}, release)
}

// far is the other end than e.
func (c *conn) far(e *end) *end {
	if e == c.dialled {
		return c.accepted
	}
	return c.dialled
}

// connect opens a connection; the far side learns of it before any message.
func (e *end) connect() bool {
	f := e.net.fabric
	f.mu.Lock()
	l := f.mu.listeners[e.addr]
	f.mu.Unlock()
	if l == nil {
		e.lost(block.Errorf(block.Unavailable, "connect to %s: nobody listens there", e.addr))
		return false
	}
	c := &conn{dialled: e, accepted: &end{net: l.net, h: l.h, addr: e.net.name, owner: l}}
	reset := func(e *end) func() {
		return func() {
			if e.conn == c {
				e.lost(block.Errorf(block.Unavailable, "connection with %s reset", e.addr))
			}
		}
	}
	route := f.carrier.Connect(e.net, l.net, Resets{Dialler: reset(e), Accepter: reset(c.accepted)})
	if route == nil {
		route = lostRoute{}
	}
	e.conn, c.route = c, route
	hello := e.net.id.Hello
	route.Carry(l.net, transport.Control, 0, true, func() { l.accept(c, hello) }, func() {})
	return true
}

// lostRoute is that of a connection that never came about.
type lostRoute struct{}

func (lostRoute) Carry(_ *Network, _ transport.Class, _ int, _ bool, _, drop func()) { drop() }

func (l *listener) accept(c *conn, hello transport.Hello) {
	err := l.net.id.Check(hello)
	if l.stopped {
		err = block.Errorf(block.Unavailable, "%s no longer listens", l.addr)
	}
	if err != nil {
		c.tell(c.dialled, err)
		return
	}
	c.accepted.conn = c
	l.ends = append(l.ends, c.accepted)
	c.accepted.h.Receive(c.accepted, transport.Message{Type: transport.TypeHello, Header: transport.AppendHello(nil, hello)})
}

// tell lets the far end know that the connection is gone.
func (c *conn) tell(far *end, err error) {
	c.route.Carry(far.net, transport.Data, 0, true, func() {
		if far.conn == c {
			far.lost(err)
		}
	}, func() {})
}

// Close implements transport.Peer.
func (e *end) Close() {
	if !e.closed {
		e.shut(block.Errorf(block.Unavailable, "%s closed the connection", e.net.name))
	}
}

// shut ends e for good and tells the other side.
func (e *end) shut(why error) {
	if e.closed {
		return
	}
	e.closed = true
	e.drop()
	if why == nil {
		why = block.Errorf(block.Unavailable, "%s shut down", e.net.name)
	}
	if c := e.conn; c != nil {
		c.tell(c.far(e), why)
	}
	e.conn = nil
}

// lost takes note of a connection that is gone. A dialled end connects again
// with its next Send.
func (e *end) lost(err error) {
	if e.closed {
		return
	}
	e.conn = nil
	e.drop()
	if !e.dialled {
		e.closed = true
		for i, o := range e.owner.ends {
			if o == e {
				e.owner.ends = append(e.owner.ends[:i], e.owner.ends[i+1:]...)
				break
			}
		}
	}
	e.h.Closed(e, err)
}

func (e *end) drop() {
	for class, ms := range e.out {
		for i := range ms {
			e.queued.Add(-int64(ms[i].Bytes()))
			ms[i].Release()
		}
		e.out[class] = nil
	}
}
