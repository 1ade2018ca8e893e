package raftgroup_test

import (
	"fmt"
	"hash/fnv"
	"os"
	"slices"
	"testing"
	"time"

	"firn.io/firn/cluster/raftgroup"
	"firn.io/firn/cluster/transport/sim"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
)

// chaos runs a cluster under crashes, cuts, loss, slow disks, transfers and
// truncation, then heals it, and checks that what was acknowledged is applied
// everywhere once. It returns a hash of all that was answered, and when.
func chaos(t *testing.T, seed uint64, steps int) uint64 {
	c := newCluster(t, seed, 3, 3, raftgroup.Limits{
		RetainedBytes: 128 << 10, InflightBytes: 512 << 10, WindowBytes: 128 << 10, WindowsBytes: 512 << 10, ProposedBytes: 4 << 20,
	})
	r := c.world.Rand()
	trace := fnv.New64a()
	acked := make(map[block.GroupID][]block.OpSeq)
	type sent struct {
		o *outcome
		g block.GroupID
	}
	var open []sent
	settle := func() {
		open = slices.DeleteFunc(open, func(s sent) bool {
			if s.o.ended == 0 {
				return false
			}
			fmt.Fprintln(trace, s.g, s.o.opSeq, s.o.status, s.o.result.Version, c.world.Now())
			if s.o.status == wire.StatusOK {
				acked[s.g] = append(acked[s.g], s.o.opSeq)
			}
			return true
		})
	}
	for range steps {
		p := c.procs[r.IntN(3)]
		g := c.groups[r.IntN(3)]
		switch n := r.IntN(100); {
		case n < 70:
			if l := c.leader(g); l != nil {
				for range 1 + r.IntN(6) {
					open = append(open, sent{c.propose(l, g, []int{0, 1, 1, 4, 64, 256}[r.IntN(6)]), g})
				}
			}
		case n < 74:
			if p.loop.Dead() {
				p.start()
			} else {
				p.crash()
			}
		case n < 77:
			q := c.procs[r.IntN(3)]
			c.net.Cut(addr(p.id), addr(q.id))
		case n < 82:
			c.net.HealAll()
		case n < 85:
			c.net.SetFaults(sim.Faults{MinDelay: time.Microsecond, MaxDelay: time.Duration(1+r.IntN(20)) * time.Millisecond, LossPerMille: r.IntN(100)})
		case n < 88:
			if !p.loop.Dead() {
				p.loop.Pause()
				c.world.RunFor(time.Duration(r.IntN(1500)) * time.Millisecond)
				p.loop.Resume()
			}
		case n < 90:
			if l := p.logs[g]; !p.loop.Dead() && l != nil {
				l.stuck = !l.stuck
				p.loop.Post(l.pump)
			}
		case n < 94:
			if gr := p.host.Group(g); gr != nil && !p.loop.Dead() {
				p.checkpoint(g)
				at := p.disks[g].checkpoint.applied.Index
				if r.IntN(3) > 0 {
					at = min(at, gr.SlowestMatch())
				}
				p.loop.Post(func() { gr.Truncate(at, nil) })
			}
		case n < 97:
			if l := c.leader(g); l != nil {
				l.loop.Post(func() { l.host.Group(g).SendLeaderAway() })
			}
		}
		c.world.RunFor(time.Duration(r.IntN(40)) * time.Millisecond)
		settle()
	}
	c.net.HealAll()
	c.net.SetFaults(sim.Faults{})
	for _, p := range c.procs {
		if p.loop.Dead() {
			p.start()
		}
		for _, l := range p.logs {
			l.stuck = false
			p.loop.Post(l.pump)
		}
	}
	c.world.RunFor(3 * time.Second)
	for _, g := range c.groups {
		c.ok(c.propose(c.elect(g), g, 1))
		c.agree(g)
	}
	settle()
	if len(open) > 0 {
		// Those of processes that were killed never end; others must have.
		for _, s := range open {
			if s.o.ended > 1 {
				t.Errorf("proposal %d ended %d times", s.o.opSeq, s.o.ended)
			}
		}
	}
	c.checkLogs()
	for _, p := range c.procs {
		for _, err := range p.failed {
			t.Errorf("node %d halted: %v", p.id, err)
		}
		for _, g := range c.groups {
			ops := slices.Clone(p.states[g].ops)
			slices.Sort(ops)
			if d := slices.Compact(slices.Clone(ops)); len(d) != len(ops) {
				t.Errorf("node %d group %d applied a command twice", p.id, g)
			}
			for _, op := range acked[g] {
				if _, ok := slices.BinarySearch(ops, op); !ok {
					t.Errorf("node %d group %d lost acknowledged command %d", p.id, g, op)
				}
			}
			fmt.Fprintln(trace, p.id, g, p.states[g].sum, p.states[g].applied)
		}
	}
	return trace.Sum64()
}

func TestChaos(t *testing.T) {
	seeds := 12
	if os.Getenv("FIRN_TEST_LONG") != "" {
		seeds = 500
	}
	for seed := range seeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { chaos(t, uint64(seed)+100, 250) })
	}
}

func TestSeedReplays(t *testing.T) {
	if a, b := chaos(t, 7, 200), chaos(t, 7, 200); a != b {
		t.Fatalf("one seed, two histories: %x and %x", a, b)
	}
	if chaos(t, 7, 200) == chaos(t, 8, 200) {
		t.Fatal("two seeds, one history")
	}
}
