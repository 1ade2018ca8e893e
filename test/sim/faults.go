package sim

import (
	"time"

	simnet "firn.io/firn/cluster/transport/sim"
)

// faults breaks things, at times drawn from the seed, until stop.
type faults struct {
	c       *Cluster
	stopped bool
	counts  map[string]int
	// restart brings the gateway back after a crash.
	restart func()
}

func (f *faults) begin() { f.later() }

func (f *faults) later() {
	r := f.c.World.Rand()
	pause := 100*time.Millisecond + time.Duration(r.Int64N(int64(700*time.Millisecond)))
	f.c.World.At(f.c.World.Now().Add(pause), func() {
		if !f.stopped {
			f.strike()
			f.later()
		}
	})
}

// span draws how long something lasts.
func (f *faults) span(least, most time.Duration) time.Duration {
	return least + time.Duration(f.c.World.Rand().Int64N(int64(most-least)))
}

func (f *faults) after(d time.Duration, fn func()) { f.c.World.At(f.c.World.Now().Add(d), fn) }

func (f *faults) count(what string) { f.counts[what]++ }

func (f *faults) strike() {
	c, r := f.c, f.c.World.Rand()
	s := c.nodes[r.IntN(len(c.nodes))]
	me := nodeName(s.id)
	switch r.IntN(12) {
	case 0, 1, 2: // any number of nodes may be down at once
		if !s.running() {
			return
		}
		if r.IntN(2) == 0 {
			f.count("crash")
			s.crash()
		} else {
			f.count("crash in a write")
			s.crashInWrite()
		}
	case 3: // power fails everywhere
		f.count("blackout")
		for _, s := range c.nodes {
			if s.running() {
				s.crash()
			}
		}
	case 4, 5:
		f.count("isolate")
		c.logf("%s is cut off", me)
		others := c.names(me)
		c.Net.Isolate(me, others...)
		f.after(f.span(100*time.Millisecond, 3*time.Second), func() {
			for _, o := range others {
				c.Net.Heal(me, o)
				c.Net.Heal(o, me)
			}
		})
	case 6:
		from, to := me, c.names(me)[r.IntN(len(c.names(me)))]
		f.count("one-way cut")
		c.logf("%s is not heard by %s", from, to)
		c.Net.Cut(from, to)
		f.after(f.span(100*time.Millisecond, 2*time.Second), func() { c.Net.Heal(from, to) })
	case 7, 8:
		f.count("bad network")
		c.Net.SetFaults(simnet.Faults{MinDelay: time.Millisecond, MaxDelay: f.span(2*time.Millisecond, 60*time.Millisecond), LossPerMille: r.IntN(80)})
		f.after(f.span(100*time.Millisecond, 2*time.Second), func() { c.Net.SetFaults(simnet.Faults{}) })
	case 9:
		if !s.running() {
			return
		}
		f.count("pause")
		c.logf("%s is paused", me)
		l := s.loop
		l.Pause()
		f.after(f.span(100*time.Millisecond, 4*time.Second), l.Resume)
	case 10:
		if c.gateway == nil {
			return
		}
		f.count("gateway crash")
		c.gateway.crash()
		f.after(f.span(10*time.Millisecond, time.Second), f.restart)
	case 11:
		f.count("metadata away")
		c.Meta.SetDown(true)
		f.after(f.span(100*time.Millisecond, 4*time.Second), func() { c.Meta.SetDown(false) })
	}
}

// heal ends all faults. What is down comes back up as it was about to anyway.
func (f *faults) heal() {
	f.stopped = true
	f.c.Net.HealAll()
	f.c.Net.SetFaults(simnet.Faults{})
	f.c.Meta.SetDown(false)
	f.c.logf("all faults end")
}

// names are all processes on the network but one.
func (c *Cluster) names(but string) []string {
	var out []string
	for _, s := range c.nodes {
		if n := nodeName(s.id); n != but {
			out = append(out, n)
		}
	}
	return append(out, gatewayName)
}
