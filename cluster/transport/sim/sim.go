// Package sim is the simulator's network: the in-process transport over a
// loop.World that delays, loses, repeats, cuts and splits, all drawn from the
// world's seed. Messages of one connection and class keep their order, but for
// requests that come a second time.
package sim

import (
	"time"

	"firn.io/firn/cluster/transport"
	"firn.io/firn/cluster/transport/inproc"
	"firn.io/firn/internal/clock"
	"firn.io/firn/internal/loop"
)

// Faults says how bad the network is. The zero value loses nothing.
type Faults struct {
	// MinDelay and MaxDelay bound the way of a batch. Zero MaxDelay: 50..150 us.
	MinDelay, MaxDelay time.Duration
	// LossPerMille is how many of 1000 batches vanish.
	LossPerMille int
	// RepeatPerMille is how many of 1000 batches have their requests delivered a
	// second time, between RepeatDelay/2 and RepeatDelay later, out of order and
	// even if the connection has ended.
	RepeatPerMille int
	RepeatDelay    time.Duration
	// BytesPerSecond is the rate of one direction of a connection; 0: no limit.
	BytesPerSecond int64
}

// connectTimeout is when a dialler notices that nobody answers.
const connectTimeout = time.Second

// Net is a network of simulated processes, told apart by name.
type Net struct {
	world  *loop.World
	fabric *inproc.Fabric
	faults Faults
	cut    map[[2]string]bool // from, to

	processes map[string]*inproc.Network
	routes    []*route
	repeated  int
}

// New returns a network without faults.
func New(w *loop.World) *Net {
	n := &Net{world: w, cut: make(map[[2]string]bool), processes: make(map[string]*inproc.Network)}
	n.fabric = inproc.NewFabric(n)
	n.SetFaults(Faults{})
	return n
}

// SetFaults changes what happens to what is sent from now on.
func (n *Net) SetFaults(f Faults) {
	if f.MaxDelay == 0 {
		f.MinDelay, f.MaxDelay = 50*time.Microsecond, 150*time.Microsecond
	}
	n.faults = f
}

// Network returns the network of a process. A restarted process gets a new one
// under the same name.
func (n *Net) Network(name string, l loop.Loop, id transport.Identity) transport.Network {
	p := n.fabric.Network(name, l, id)
	n.processes[name] = p
	return p
}

// Crash takes the process of that name off the network: its address is free,
// and those it was connected with find their connections reset.
func (n *Net) Crash(name string) {
	rest := n.routes[:0]
	for _, r := range n.routes {
		switch name {
		case r.a.Name():
			n.after(n.faults.MaxDelay, r.b, r.resets.Accepter)
		case r.b.Name():
			n.after(n.faults.MaxDelay, r.a, r.resets.Dialler)
		default:
			rest = append(rest, r)
		}
	}
	n.routes = rest
	if p := n.processes[name]; p != nil {
		n.fabric.Remove(p)
		delete(n.processes, name)
	}
}

func (n *Net) after(d time.Duration, to *inproc.Network, fn func()) {
	n.world.At(n.world.Now().Add(d), func() { to.Loop().Post(fn) })
}

// Cut loses everything from one process to another until Heal. It works in one
// direction; existing connections stay and are silent.
func (n *Net) Cut(from, to string) { n.cut[[2]string{from, to}] = true }

// Heal undoes Cut.
func (n *Net) Heal(from, to string) { delete(n.cut, [2]string{from, to}) }

// Isolate cuts a process from all the others given, both ways.
func (n *Net) Isolate(name string, others ...string) {
	for _, o := range others {
		n.Cut(name, o)
		n.Cut(o, name)
	}
}

// HealAll undoes all cuts.
func (n *Net) HealAll() { clear(n.cut) }

// Connect implements inproc.Carrier.
func (n *Net) Connect(from, to *inproc.Network, resets inproc.Resets) inproc.Route {
	if n.cut[[2]string{from.Name(), to.Name()}] || n.cut[[2]string{to.Name(), from.Name()}] {
		n.after(connectTimeout, from, resets.Dialler)
		return nil
	}
	r := &route{net: n, a: from, b: to, resets: resets}
	n.routes = append(n.routes, r)
	return r
}

// Late implements inproc.Duplicator.
func (r *route) Late(to *inproc.Network, _ transport.Class) func(deliver, drop func()) {
	n, w := r.net, r.net.world
	f := n.faults
	if f.RepeatPerMille == 0 || w.Rand().IntN(1000) >= f.RepeatPerMille {
		return nil
	}
	least := f.RepeatDelay / 2
	at := w.Now().Add(least + time.Duration(w.Rand().Int64N(int64(f.RepeatDelay-least)+1)))
	from := r.a.Name()
	return func(deliver, drop func()) {
		w.At(at, func() {
			if n.cut[[2]string{from, to.Name()}] {
				drop()
				return
			}
			n.repeated++
			to.Loop().Post(deliver)
		})
	}
}

// Repeated is how many batches were delivered a second time.
func (n *Net) Repeated() int { return n.repeated }

type route struct {
	net    *Net
	a, b   *inproc.Network
	resets inproc.Resets
	last   [2][2]clock.Instant // by direction and class: when the newest delivery is due
}

// Carry implements inproc.Route.
func (r *route) Carry(to *inproc.Network, c transport.Class, bytes int, urgent bool, deliver, drop func()) {
	n, w := r.net, r.net.world
	from, dir := r.a, 0
	if to == r.a {
		from, dir = r.b, 1
	}
	if n.cut[[2]string{from.Name(), to.Name()}] && !urgent {
		drop()
		return
	}
	if !urgent && n.faults.LossPerMille > 0 && w.Rand().IntN(1000) < n.faults.LossPerMille {
		drop()
		return
	}
	d := n.faults.MinDelay + time.Duration(w.Rand().Int64N(int64(n.faults.MaxDelay-n.faults.MinDelay)+1))
	at := w.Now().Add(d)
	if rate := n.faults.BytesPerSecond; rate > 0 {
		at = max(at, r.last[dir][c]).Add(time.Duration(int64(bytes) * int64(time.Second) / rate))
	}
	at = max(at, r.last[dir][c]+1)
	if urgent {
		at = max(at, r.last[dir][0], r.last[dir][1])
		r.last[dir] = [2]clock.Instant{at, at}
	}
	r.last[dir][c] = at
	w.At(at, func() { to.Loop().Post(deliver) })
}
