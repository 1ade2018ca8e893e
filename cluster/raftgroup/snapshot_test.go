package raftgroup_test

import (
	"testing"
	"time"

	"firn.io/firn/cluster/raftgroup"
)

// forget truncates a live replica's log up to what it has applied, whoever lacks it.
func (p *process) forget() {
	p.c.t.Helper()
	p.checkpoint(1)
	done := false
	p.loop.Post(func() {
		p.host.Group(1).Truncate(p.disks[1].checkpoint.applied.Index, func(err error) { done = err == nil })
	})
	p.c.until("the truncation", time.Second, func() bool { return done })
}

func TestFollowerBehindTheLogIsCopied(t *testing.T) {
	for _, tc := range []struct {
		name string
		// crash instead of a cut; leave: the leader changes while the copy is made.
		crash, leave bool
	}{{name: "cut off"}, {name: "crashed", crash: true}, {name: "another leader", crash: true, leave: true}} {
		t.Run(tc.name, func(t *testing.T) {
			c := newCluster(t, 300, 3, 1, raftgroup.Limits{})
			p := c.elect(1)
			q, away := c.procs[p.id%3], c.procs[(p.id+1)%3]
			c.ok(c.propose(p, 1, 1))
			c.agree(1)
			if tc.crash {
				away.crash()
			} else {
				c.net.Cut(addr(p.id), addr(away.id))
				c.net.Cut(addr(q.id), addr(away.id))
			}
			for range 20 {
				c.ok(c.propose(p, 1, 1))
			}
			p.forget()
			q.forget()
			c.ok(c.propose(p, 1, 1))
			if tc.crash {
				away.start()
			} else {
				c.net.HealAll()
			}
			c.until("the follower hears that it is behind", 10*time.Second, func() bool { return away.copies > 0 })
			if tc.leave {
				p.loop.Post(func() { p.host.Group(1).SendLeaderAway() })
				c.until("another leader", 5*time.Second, func() bool { return c.leader(1) != nil && c.leader(1) != p })
			}
			c.ok(c.propose(c.elect(1), 1, 1))
			c.agree(1)
			for range 5 {
				c.ok(c.propose(c.elect(1), 1, 1))
			}
			c.agree(1)
			if away.copies != 1 {
				t.Errorf("%d copies, want 1: the log reaches the rest", away.copies)
			}
			for _, p := range c.procs {
				for _, err := range p.failed {
					t.Errorf("node %d halted: %v", p.id, err)
				}
			}
		})
	}
}
