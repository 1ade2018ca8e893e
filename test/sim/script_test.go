package sim

import (
	"cmp"
	"fmt"
	"os"
	"testing"
	"time"

	"firn.io/firn/cluster/meta"
	simnet "firn.io/firn/cluster/transport/sim"
	"firn.io/firn/internal/block"
)

// small is a cluster for scripts, under a light load.
func small(seed uint64) Options {
	return Options{Seed: seed, Nodes: 3, VolumeBytes: 8 << 20, Writers: 4, Pause: 10 * time.Millisecond}
}

// script runs a cluster under load in which nothing breaks but what fn breaks.
func script(t *testing.T, o Options, fn func(c *Cluster, l *load) error) {
	t.Helper()
	defer holdEntropy(o.Seed)()
	if *seed != 0 {
		o.Log = os.Stderr
	}
	o.Plain, o.DiskBytes = true, cmp.Or(o.DiskBytes, largeDisk)
	c := newCluster(o)
	l, err := c.boot()
	if err == nil {
		err = fn(c, l)
	}
	if err := cmp.Or(c.failure, l.w.fault, err); err != nil {
		t.Fatal(err)
	}
}

// quiesce stops the load and waits until all is answered.
func (c *Cluster) quiesce(l *load) error {
	l.stopped = true
	if !c.runUntil(recoveryLimit, func() bool { return len(l.w.inFlight) == 0 || l.w.fault != nil }) {
		return fmt.Errorf("progress: %d operations have no answer", len(l.w.inFlight))
	}
	return nil
}

// takeOver waits until the other gateway has the volume, which its owner was
// asked or forced to give up.
func (c *Cluster) takeOver() error {
	old, next := c.owner()
	c.want(next)
	if !c.runUntil(recoveryLimit, func() bool { return c.attached() != nil }) {
		return fmt.Errorf("progress: %s does not give way to %s", old.name, next.name)
	}
	return nil
}

// What was acknowledged is there after a power cut that leaves nothing that was
// not synced.
func TestPowerCutKeepsWhatWasAcknowledged(t *testing.T) {
	script(t, small(41), func(c *Cluster, l *load) error {
		for range 3 {
			l.stopped = false
			if a := c.attached(); a != nil {
				a.loop.Post(func() { l.fill(a) })
			}
			c.runFor(time.Second)
			for _, s := range c.nodes {
				s.kill()
				s.fs, s.store = s.fs.Crash(nil), s.store.Crash(0)
				s.back(100 * time.Millisecond)
			}
			if err := cmp.Or(c.quiesce(l), c.verify(l.w)); err != nil {
				return err
			}
		}
		return nil
	})
}

// What a leader that is cut off has acknowledged is there without it.
func TestAcknowledgedIsOnAMajority(t *testing.T) {
	o := small(42)
	o.Writers, o.Pause = 48, 4*time.Millisecond // most of them wait for groups that are led elsewhere
	script(t, o, func(c *Cluster, l *load) error {
		c.runFor(200 * time.Millisecond)
		// The gateway reaches one node, which reaches no other and may think for a
		// while that it still leads its groups.
		s := c.nodes[0]
		for _, o := range c.nodes[1:] {
			for _, me := range []string{nodeName(s.id), c.seats[0].name} {
				c.Net.Cut(me, nodeName(o.id))
				c.Net.Cut(nodeName(o.id), me)
			}
		}
		c.runFor(300 * time.Millisecond)
		l.w.c.logf("%d operations have ended", l.w.ended)
		c.seats[0].crash(time.Minute)
		s.kill()
		c.Net.HealAll()
		if err := cmp.Or(c.takeOver(), c.quiesce(l)); err != nil {
			return err
		}
		return c.verify(l.w)
	})
}

// Requests of the owner come again after newer ones were answered.
func TestRepeatedRequestsOfTheOwner(t *testing.T) {
	script(t, small(43), func(c *Cluster, l *load) error {
		c.Net.SetFaults(simnet.Faults{RepeatPerMille: 500, RepeatDelay: 4 * time.Second})
		c.runFor(2 * time.Second)
		c.Net.SetFaults(simnet.Faults{})
		if err := c.quiesce(l); err != nil {
			return err
		}
		c.runFor(5 * time.Second)
		if c.Net.Repeated() < 100 {
			return fmt.Errorf("only %d batches came again", c.Net.Repeated())
		}
		return c.verify(l.w)
	})
}

// lateness is so long that half of it is enough for the other gateway to take the
// volume and to write.
const lateness = 24 * time.Second

// Requests of a gateway that is dead, or was removed by force and does not know
// it, come again, or for the first time, after the next one has written.
func TestLateRequestsOfAnOldOwner(t *testing.T) {
	for _, force := range []bool{false, true} {
		t.Run(fmt.Sprintf("force=%v", force), func(t *testing.T) {
			script(t, small(44), func(c *Cluster, l *load) error {
				c.Net.SetFaults(simnet.Faults{RepeatPerMille: 500, RepeatDelay: lateness})
				c.runFor(time.Second)
				c.Net.SetFaults(simnet.Faults{})
				before := c.Net.Repeated()
				old := c.seats[0]
				if force {
					old.process.loop.Pause()
					if _, err := meta.ForceOwner(c.ctx, c.Meta.Client(), c.volume.ID); err != nil {
						return err
					}
				} else {
					old.crash(time.Minute)
				}
				if err := c.takeOver(); err != nil {
					return err
				}
				c.runFor(time.Second)
				if force {
					old.process.loop.Resume()
				}
				if err := c.quiesce(l); err != nil {
					return err
				}
				c.runFor(lateness)
				if n := c.Net.Repeated() - before; n < 50 {
					return fmt.Errorf("only %d batches came late", n)
				}
				return c.verify(l.w)
			})
		})
	}
}

// Power fails between a checkpoint and its flush, on disks so full that every
// segment is used again as soon as it may be.
func TestCrashesInCheckpoints(t *testing.T) {
	o := small(45)
	o.DiskBytes, o.SlowMerges, o.Writers, o.VolumeBytes, o.Pause = 56<<20, 100, 8, 24<<20, 0
	script(t, o, func(c *Cluster, l *load) error {
		for range 4 {
			c.runFor(2 * time.Second)
			for _, s := range c.nodes {
				s.crashFlush = true
			}
			c.runFor(2 * time.Second)
		}
		for _, s := range c.nodes {
			s.crashFlush = false
		}
		moved := uint64(0)
		for _, s := range c.nodes {
			if s.running() {
				moved += s.node.Status().Counters.Moved
			}
		}
		t.Logf("%d runs of blocks moved", moved)
		if err := cmp.Or(c.quiesce(l), c.verify(l.w)); err != nil {
			return err
		}
		r := Report{}
		return c.compare(&r)
	})
}

// stallLimit is what one fault may cost (C4), takeoverLimit what the death of a
// gateway may.
const (
	stallLimit    = 3 * time.Second
	takeoverLimit = 5 * time.Second
)

// One fault at a time costs a short stall and no rebuild.
func TestStallLimits(t *testing.T) {
	leader := func(c *Cluster) *storage {
		best := c.nodes[0]
		leads := func(s *storage) int { st := s.node.Status(); return st.Leading() }
		for _, s := range c.nodes {
			if leads(s) > leads(best) {
				best = s
			}
		}
		return best
	}
	for _, x := range []struct {
		name  string
		limit time.Duration
		lasts time.Duration
		begin func(c *Cluster) (end func())
	}{
		{"node killed", stallLimit, 5 * time.Second, func(c *Cluster) func() {
			s := leader(c)
			s.kill()
			s.crashDisk()
			return func() { s.back(0) }
		}},
		{"node paused for 60 s", stallLimit, 60 * time.Second, func(c *Cluster) func() {
			l := leader(c).loop
			l.Pause()
			return l.Resume
		}},
		{"disk stalled for 5 s", stallLimit, 5 * time.Second, func(c *Cluster) func() {
			leader(c).stalled = c.World.Now().Add(5 * time.Second)
			return func() {}
		}},
		{"leader cut off", stallLimit, 10 * time.Second, func(c *Cluster) func() {
			s := leader(c)
			c.isolate(s, true)
			return func() { c.isolate(s, false) }
		}},
		{"leader cut off from its followers", stallLimit, 10 * time.Second, func(c *Cluster) func() {
			s := leader(c)
			for _, o := range c.nodes {
				if o != s {
					c.Net.Isolate(nodeName(s.id), nodeName(o.id))
				}
			}
			return c.Net.HealAll
		}},
		{"node restarted", stallLimit, 5 * time.Second, func(c *Cluster) func() {
			leader(c).restart()
			return func() {}
		}},
		{"metadata away for 20 s", stallLimit, 20 * time.Second, func(c *Cluster) func() {
			c.Meta.SetDown(true)
			return func() { c.Meta.SetDown(false) }
		}},
		{"gateway killed", takeoverLimit, 6 * time.Second, func(c *Cluster) func() {
			old, next := c.owner()
			old.crash(time.Minute)
			c.want(next)
			return func() {}
		}},
	} {
		t.Run(x.name, func(t *testing.T) {
			o := small(46)
			o.Pause = 50 * time.Millisecond
			script(t, o, func(c *Cluster, l *load) error {
				c.runFor(2 * time.Second)
				before := c.members()
				l.w.stall = 0
				begun := c.World.Now()
				end := x.begin(c)
				// The time without any answer counts also when what was in flight has
				// died with its gateway.
				silence, last, answers := time.Duration(0), begun, l.w.ended
				c.runUntil(x.lasts, func() bool {
					if now := c.World.Now(); l.w.ended != answers {
						answers, silence, last = l.w.ended, max(silence, now.Sub(last)), now
					}
					return false
				})
				silence = max(silence, c.World.Now().Sub(last))
				end()
				c.runFor(5 * time.Second)
				if err := cmp.Or(c.quiesce(l), c.verify(l.w)); err != nil {
					return err
				}
				stall := max(l.w.stall, silence)
				t.Logf("longest stall %v", stall)
				if stall > x.limit {
					return fmt.Errorf("stall: %v, at most %v is allowed", stall, x.limit)
				}
				if err := c.compare(&Report{}); err != nil {
					return err
				}
				for at, r := range c.members() {
					if before[at] != r {
						return fmt.Errorf("rebuild: group %d has replica %d on node %d, and had %d", at.group, r, at.node, before[at])
					}
				}
				return nil
			})
		})
	}
}

type place struct {
	node  block.NodeID
	group block.GroupID
}

// members tells which replicas the nodes hold.
func (c *Cluster) members() map[place]block.ReplicaID {
	out := map[place]block.ReplicaID{}
	for _, s := range c.nodes {
		for _, r := range s.node.Status().Replicas {
			out[place{s.id, r.Group}] = r.Replica
		}
	}
	return out
}
