package sim

import (
	"time"

	simnet "firn.io/firn/cluster/transport/sim"
)

// faults breaks things, at times drawn from the seed, until heal.
type faults struct {
	c       *Cluster
	stopped bool
	counts  map[string]int
}

// fault is one kind of thing that breaks; false: it cannot now. weight is how
// often it is drawn.
type fault struct {
	name   string
	weight int
	strike func(*faults, *storage) bool
}

var kinds = []fault{
	{"crash", 4, func(_ *faults, s *storage) bool { return s.ifUp(s.crash) }},
	{"crash in a write", 4, func(f *faults, s *storage) bool {
		return s.ifUp(func() { s.crashIn = 1 + f.c.World.Rand().IntN(6) })
	}},
	{"crash in a checkpoint", 3, func(_ *faults, s *storage) bool { return s.ifUp(func() { s.crashFlush = true }) }},
	{"blackout", 3, (*faults).blackout},
	{"restart", 2, func(_ *faults, s *storage) bool { return s.ifUp(s.restart) }},
	{"isolate", 4, (*faults).isolate},
	{"one-way cut", 3, (*faults).cut},
	{"bad network", 4, (*faults).badNetwork},
	{"repeated requests", 5, (*faults).repeat},
	{"pause", 3, (*faults).pause},
	{"disk stall", 2, (*faults).stall},
	{"bad reads", 3, func(f *faults, s *storage) bool {
		return s.ifUp(func() { s.badReads += 1 + f.c.World.Rand().IntN(6) })
	}},
	{"full file system", 2, (*faults).fill},
	{"disk failure", 1, (*faults).failDisk},
	{"rot", 2, func(f *faults, _ *storage) bool { return f.c.victim.ifUp(f.c.victim.rot) }},
	{"empty disk", 1, func(f *faults, _ *storage) bool { return f.c.victim.ifUp(f.c.victim.replace) }},
	{"clock", 3, (*faults).skew},
	{"gateway crash", 4, (*faults).gatewayCrash},
	{"gateway pause", 3, (*faults).gatewayPause},
	{"takeover", 4, (*faults).takeover},
	{"metadata away", 3, (*faults).metaAway},
	{"metadata away from one", 2, (*faults).metaCut},
	{restored, 1, (*faults).metaRestore},
}

const restored = "metadata restored"

// weightOf is 0 for what the options leave out.
func (f *faults) weightOf(k fault) int {
	if k.name == restored && !f.c.opt.Restores {
		return 0
	}
	return k.weight
}

func (s *storage) ifUp(do func()) bool {
	if !s.running() {
		return false
	}
	do()
	return true
}

func (f *faults) begin() { f.later() }

func (f *faults) later() {
	r := f.c.World.Rand()
	pause := 80*time.Millisecond + time.Duration(r.Int64N(int64(500*time.Millisecond)))
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

func (f *faults) strike() {
	c, r := f.c, f.c.World.Rand()
	s := c.nodes[r.IntN(len(c.nodes))]
	total := 0
	for _, k := range kinds {
		total += f.weightOf(k)
	}
	at := r.IntN(total)
	for _, k := range kinds {
		if at -= f.weightOf(k); at >= 0 {
			continue
		}
		c.logf("fault: %s, %s", k.name, nodeName(s.id))
		if k.strike(f, s) {
			f.counts[k.name]++
		}
		return
	}
}

// blackout takes the power of all nodes.
func (f *faults) blackout(*storage) bool {
	for _, s := range f.c.nodes {
		s.ifUp(s.crash)
	}
	return true
}

func (f *faults) isolate(s *storage) bool {
	f.c.isolate(s, true)
	f.after(f.span(100*time.Millisecond, 3*time.Second), func() { f.c.isolate(s, false) })
	return true
}

// isolate cuts a node, and the coordinator beside it, from all others.
func (c *Cluster) isolate(s *storage, cut bool) {
	for _, me := range []string{nodeName(s.id), coordinatorName(s.id)} {
		for _, o := range c.names(nodeName(s.id)) {
			if cut {
				c.Net.Cut(me, o)
				c.Net.Cut(o, me)
			} else {
				c.Net.Heal(me, o)
				c.Net.Heal(o, me)
			}
		}
	}
}

func (f *faults) cut(s *storage) bool {
	c, r := f.c, f.c.World.Rand()
	others := c.names(nodeName(s.id))
	from, to := nodeName(s.id), others[r.IntN(len(others))]
	if r.IntN(2) == 0 {
		from, to = to, from
	}
	c.Net.Cut(from, to)
	f.after(f.span(100*time.Millisecond, 2*time.Second), func() { c.Net.Heal(from, to) })
	return true
}

func (f *faults) badNetwork(*storage) bool {
	f.c.Net.SetFaults(simnet.Faults{MinDelay: time.Millisecond, MaxDelay: f.span(2*time.Millisecond, 60*time.Millisecond),
		LossPerMille: f.c.World.Rand().IntN(80)})
	f.after(f.span(100*time.Millisecond, 2*time.Second), func() { f.c.Net.SetFaults(simnet.Faults{}) })
	return true
}

func (f *faults) repeat(*storage) bool {
	f.c.Net.SetFaults(simnet.Faults{RepeatPerMille: 50 + f.c.World.Rand().IntN(300), RepeatDelay: f.span(500*time.Millisecond, 8*time.Second)})
	f.after(f.span(100*time.Millisecond, 2*time.Second), func() { f.c.Net.SetFaults(simnet.Faults{}) })
	return true
}

// pause stops a machine; its clock goes on, or jumps ahead when it wakes up.
func (f *faults) pause(s *storage) bool {
	return s.ifUp(func() {
		l := s.loop
		l.Pause()
		f.after(f.span(100*time.Millisecond, 4*time.Second), func() {
			l.SetClock(s.clock, f.jump())
			l.Resume()
		})
	})
}

// jump draws by how much a clock is set ahead; mostly not at all.
func (f *faults) jump() time.Duration {
	if f.c.World.Rand().IntN(3) > 0 {
		return 0
	}
	return f.span(0, 10*time.Second)
}

func (f *faults) stall(s *storage) bool {
	return s.ifUp(func() { s.stalled = f.c.World.Now().Add(f.span(500*time.Millisecond, 5*time.Second)) })
}

// fill leaves no room in the node's file system for a while.
func (f *faults) fill(s *storage) bool {
	return s.ifUp(func() {
		sp, err := s.fs.Space(diskDir)
		if err != nil {
			return
		}
		s.fs.SetCapacity(sp.TotalBytes - sp.FreeBytes + f.c.World.Rand().Int64N(pace.SegmentBytes))
		f.after(f.span(500*time.Millisecond, 4*time.Second), func() { s.fs.SetCapacity(2 * f.c.diskBytes) })
	})
}

// failDisk makes a write or a sync fail, after which the disk is not used any
// more; its operator replaces it.
func (f *faults) failDisk(*storage) bool {
	s := f.c.victim
	return s.ifUp(func() {
		if f.c.World.Rand().IntN(2) == 0 {
			s.failWrite = true
		} else {
			s.failSync = true
		}
		f.after(f.span(time.Second, 4*time.Second), func() {
			if s.failed() {
				s.replace()
			}
		})
	})
}

// skew changes the rate of a machine's clock, within what is trusted (F3).
func (f *faults) skew(s *storage) bool {
	r := f.c.World.Rand()
	rate := 0.975 + 0.05*r.Float64()
	if i := r.IntN(len(f.c.seats) + 1); i < len(f.c.seats) {
		g := f.c.seats[i]
		g.clock = rate
		if g.process != nil {
			g.process.loop.SetClock(rate, f.jump())
		}
		return true
	}
	s.clock = rate
	return s.ifUp(func() { s.loop.SetClock(rate, f.jump()) })
}

func (f *faults) gatewayCrash(*storage) bool {
	g := f.c.seats[f.c.World.Rand().IntN(len(f.c.seats))]
	if g.process == nil {
		return false
	}
	g.crash(f.span(10*time.Millisecond, time.Second))
	return true
}

func (f *faults) gatewayPause(*storage) bool {
	g := f.c.seats[f.c.World.Rand().IntN(len(f.c.seats))]
	if g.process == nil {
		return false
	}
	p := g.process
	p.loop.Pause()
	f.after(f.span(100*time.Millisecond, 7*time.Second), func() {
		p.loop.SetClock(g.clock, f.jump())
		p.loop.Resume()
	})
	return true
}

// takeover gives the volume to the other gateway: in order, after a crash, or by
// force while the old one may live on, asleep or cut off.
func (f *faults) takeover(*storage) bool {
	c, r := f.c, f.c.World.Rand()
	old, next := c.owner()
	c.want(next)
	p := old.process
	switch r.IntN(5) {
	case 0:
		if p != nil {
			p.loop.Post(p.detach)
		}
	case 1:
		if p != nil {
			old.crash(f.span(10*time.Millisecond, 6*time.Second))
		}
	case 2:
		if p != nil {
			p.loop.Pause()
			f.after(f.span(time.Second, 9*time.Second), p.loop.Resume)
		}
		c.force(c.volume.ID)
	case 3:
		if p != nil {
			p.meta.SetCut(true)
			f.after(f.span(time.Second, 9*time.Second), func() { p.meta.SetCut(false) })
		}
		c.force(c.volume.ID)
	default:
		c.force(c.volume.ID)
	}
	return true
}

func (f *faults) metaAway(*storage) bool {
	f.c.Meta.SetDown(true)
	f.after(f.span(100*time.Millisecond, 4*time.Second), func() { f.c.Meta.SetDown(false) })
	return true
}

func (f *faults) metaCut(*storage) bool {
	g := f.c.seats[f.c.World.Rand().IntN(len(f.c.seats))]
	if g.process == nil {
		return false
	}
	m := g.process.meta
	m.SetCut(true)
	f.after(f.span(time.Second, 6*time.Second), func() { m.SetCut(false) })
	return true
}

// metaRestore sets the metadata store back to what it was a while ago.
func (f *faults) metaRestore(*storage) bool {
	backup := f.c.Meta.Backup()
	f.after(f.span(500*time.Millisecond, 5*time.Second), func() {
		f.c.logf("the metadata are restored from a backup")
		f.c.restored = true
		f.c.Meta.Restore(backup)
	})
	return true
}

// heal ends all faults. What is down comes back up as it was about to anyway.
func (f *faults) heal() {
	c := f.c
	f.stopped = true
	c.Net.HealAll()
	c.Net.SetFaults(simnet.Faults{})
	c.Meta.SetDown(false)
	for _, s := range c.nodes {
		s.fs.SetCapacity(2 * c.diskBytes)
		s.badReads, s.crashIn, s.crashFlush, s.failWrite, s.failSync = 0, 0, false, false, false
		if s.failed() {
			s.replace()
		}
		if s.running() {
			s.loop.Resume()
		}
	}
	for _, g := range c.seats {
		if p := g.process; p != nil {
			p.meta.SetCut(false)
			p.loop.Resume()
		}
	}
	c.logf("all faults end")
}

// names are all processes on the network but one node's.
func (c *Cluster) names(but string) []string {
	var out []string
	for _, s := range c.nodes {
		if n := nodeName(s.id); n != but {
			out = append(out, n)
		}
	}
	for _, g := range c.seats {
		out = append(out, g.name)
	}
	return out
}
