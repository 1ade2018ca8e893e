package raftgroup_test

import (
	"slices"
	"testing"
	"time"

	"firn.io/firn/cluster/raftgroup"
	"firn.io/firn/cluster/transport/sim"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
)

func (c *cluster) ok(o *outcome) {
	c.t.Helper()
	c.until("an answer", 10*time.Second, func() bool { return o.ended > 0 })
	if o.status != wire.StatusOK || o.result.Outcome != wire.OutcomeApplied {
		c.t.Fatalf("proposal %d ended with status %d, outcome %d", o.opSeq, o.status, o.result.Outcome)
	}
}

func TestElectReplicateApply(t *testing.T) {
	c := newCluster(t, 1, 3, 1, raftgroup.Limits{})
	p := c.elect(1)
	var all []*outcome
	p.loop.Post(func() {
		for i := range 40 {
			all = append(all, c.proposeNow(p, 1, i%4))
		}
	})
	c.until("the proposals", time.Second, func() bool { return len(all) > 0 })
	for _, o := range all {
		c.ok(o)
	}
	c.agree(1)
	c.checkLogs()
	for _, q := range c.procs {
		if got := len(q.states[1].ops); got != 40 {
			t.Errorf("node %d applied %d commands", q.id, got)
		}
	}
	// One turn's proposals made one MsgProp: far fewer appends than entries.
	if a := p.host.Counters().Appends; a > 15 {
		t.Errorf("%d log writes for 40 proposals of one turn", a)
	}
}

func TestSoleVoterLeadsAtOnce(t *testing.T) {
	c := newCluster(t, 2, 1, 3, raftgroup.Limits{})
	start := c.world.Now()
	for _, g := range c.groups {
		c.elect(g)
	}
	if d := c.world.Now().Sub(start); d > 20*time.Millisecond {
		t.Errorf("the only voter took %v to lead", d)
	}
	c.ok(c.propose(c.procs[0], 2, 1))
}

func TestReadIndex(t *testing.T) {
	c := newCluster(t, 3, 3, 1, raftgroup.Limits{})
	p := c.elect(1)
	o := c.propose(p, 1, 1)
	c.ok(o)
	var index uint64
	var ok, done bool
	p.loop.Post(func() { p.host.Group(1).ReadIndex(func(i uint64, k bool) { index, ok, done = i, k, true }) })
	c.until("a read index", time.Second, func() bool { return done })
	if !ok || index < o.result.Version.RaftIndex() || p.host.Group(1).Applied().Index < index {
		t.Fatalf("read index %d ok %v after a write at %v, applied %d", index, ok, o.result.Version, p.host.Group(1).Applied().Index)
	}
	// A follower refuses; a leader that is cut off does not answer ok.
	other := c.procs[p.id%3]
	done = false
	other.loop.Post(func() { other.host.Group(1).ReadIndex(func(_ uint64, k bool) { ok, done = k, true }) })
	c.until("a refusal", time.Second, func() bool { return done })
	if ok {
		t.Fatal("a follower confirmed a read index")
	}
	done = false
	c.net.Isolate(addr(p.id), addr(1), addr(2), addr(3))
	p.loop.Post(func() { p.host.Group(1).ReadIndex(func(_ uint64, k bool) { ok, done = k, true }) })
	c.until("the cut-off leader's answer", 5*time.Second, func() bool { return done })
	if ok {
		t.Fatal("a leader without a majority confirmed a read index")
	}
}

func TestLossOfTheLeadDropsProposals(t *testing.T) {
	c := newCluster(t, 4, 3, 1, raftgroup.Limits{})
	p := c.elect(1)
	c.ok(c.propose(p, 1, 1))
	c.net.Isolate(addr(p.id), addr(1), addr(2), addr(3))
	lost := c.propose(p, 1, 2)
	c.until("the end of the proposal", 5*time.Second, func() bool { return lost.ended > 0 })
	if lost.status != wire.StatusDropped {
		t.Fatalf("status %d, want dropped", lost.status)
	}
	c.until("another leader", 5*time.Second, func() bool { l := c.leader(1); return l != nil && l != p })
	q := c.leader(1)
	for range 20 {
		c.ok(c.propose(q, 1, 1))
	}
	c.net.HealAll()
	c.agree(1)
	c.checkLogs()
	if slices.Contains(q.states[1].ops, lost.opSeq) {
		t.Error("a proposal that no majority had was applied")
	}
	if lost.ended != 1 {
		t.Errorf("the proposal ended %d times", lost.ended)
	}
}

func TestRestartReplaysFromTheCheckpoint(t *testing.T) {
	c := newCluster(t, 5, 3, 2, raftgroup.Limits{})
	p := c.elect(1)
	for i := range 30 {
		c.ok(c.propose(p, 1, 1+i%2))
		if i == 10 {
			for _, q := range c.procs {
				q.checkpoint(1)
			}
		}
	}
	c.agree(1)
	for _, q := range c.procs {
		q.crash()
	}
	for _, q := range c.procs {
		q.start()
	}
	p = c.elect(1)
	c.ok(c.propose(p, 1, 3))
	c.agree(1)
	c.checkLogs()
	if got := len(p.states[1].ops); got != 31 {
		t.Errorf("%d commands applied after the restart, want 31", got)
	}
}

func TestFollowerFarBehindIsFedFromTheLog(t *testing.T) {
	c := newCluster(t, 6, 3, 1, raftgroup.Limits{RetainedBytes: 64 << 10, WindowBytes: 256 << 10, WindowsBytes: 1 << 20})
	p := c.elect(1)
	behind := c.procs[p.id%3]
	behind.crash()
	for range 300 {
		c.ok(c.propose(p, 1, 4))
	}
	if n := p.host.RetainedBytes(); n > 64<<10+32<<10 {
		t.Errorf("%d bytes retained, the limit is %d", n, 64<<10)
	}
	behind.start()
	start := c.world.Now()
	c.agree(1)
	c.checkLogs()
	if n := p.host.Counters().WindowReads; n < 10 || n > 300 {
		t.Errorf("%d reads of the log for 4.9 MiB in windows of 256 KiB", n)
	}
	t.Logf("caught up with 300 entries of 16 KiB in %v, %d reads", c.world.Now().Sub(start), p.host.Counters().WindowReads)
}

// A leader whose log is rotten where a follower has to be fed from it lets
// another member do that (L4).
func TestLeaderThatCannotReadItsLogGivesTheLeadAway(t *testing.T) {
	c := newCluster(t, 6, 3, 1, raftgroup.Limits{RetainedBytes: 64 << 10, WindowBytes: 256 << 10, WindowsBytes: 1 << 20})
	p := c.elect(1)
	behind := c.procs[p.id%3]
	behind.crash()
	for range 100 {
		c.ok(c.propose(p, 1, 4))
	}
	for _, l := range p.logs {
		l.rotten = true
	}
	behind.start()
	c.until("another leader", 5*time.Second, func() bool { l := c.leader(1); return l != nil && l != p })
	c.agree(1)
	if n := p.host.Counters().ReadErrors; n == 0 {
		t.Error("no read failed")
	}
}

func TestInflightBudget(t *testing.T) {
	c := newCluster(t, 7, 3, 1, raftgroup.Limits{InflightBytes: 1 << 20})
	p := c.elect(1)
	c.net.SetFaults(sim.Faults{MinDelay: 20 * time.Millisecond, MaxDelay: 20 * time.Millisecond})
	var all []*outcome
	for range 16 {
		all = append(all, c.propose(p, 1, 128))
	}
	most := 0
	c.until("all answers", 10*time.Second, func() bool {
		for _, peer := range p.out {
			most = max(most, peer.QueuedBytes())
		}
		return !slices.ContainsFunc(all, func(o *outcome) bool { return o.ended == 0 })
	})
	for _, o := range all {
		c.ok(o)
	}
	if most > 1<<20+64<<10 {
		t.Errorf("%d bytes on the way to one node, the budget is 1 MiB", most)
	}
	c.agree(1)
}

func TestProposedBudgetAndBadCommands(t *testing.T) {
	c := newCluster(t, 8, 3, 1, raftgroup.Limits{ProposedBytes: 100 << 10})
	p := c.elect(1)
	var all []*outcome
	for range 40 {
		all = append(all, c.propose(p, 1, 1))
	}
	busy := 0
	for _, o := range all {
		c.until("an answer", time.Second, func() bool { return o.ended > 0 })
		if o.status == wire.StatusBusy {
			busy++
		}
	}
	if busy < 10 || busy > 20 {
		t.Errorf("%d of 40 proposals of 4.6 KiB refused by a budget of 100 KiB", busy)
	}
	c.ok(c.propose(p, 1, 1))
	var st wire.Status
	p.loop.Post(func() {
		p.host.Group(1).Propose(&wire.Command{Type: 99}, nil, func(_ wire.ApplyResult, s wire.Status) { st = s })
	})
	c.until("a refusal", time.Second, func() bool { return st != 0 })
	if st != wire.StatusInvalid {
		t.Errorf("a command of an unknown type: status %d", st)
	}
}

func TestSlowDiskGivesTheLeadAway(t *testing.T) {
	c := newCluster(t, 9, 3, 2, raftgroup.Limits{})
	p := c.elect(1)
	c.ok(c.propose(p, 1, 1))
	start := c.world.Now()
	for _, l := range p.logs {
		l.stuck = true
	}
	o := c.propose(p, 1, 1)
	c.until("another leader", 3*time.Second, func() bool { l := c.leader(1); return l != nil && l != p })
	d := c.world.Now().Sub(start)
	if d < 450*time.Millisecond || d > time.Second {
		t.Errorf("the lead moved after %v", d)
	}
	c.ok(c.propose(c.leader(1), 1, 1))
	t.Logf("the lead moved after %v; the proposal ended with status %d", d, o.status)
	for _, l := range p.logs {
		l.stuck = false
		p.loop.Post(l.pump)
	}
	c.agree(1)
}

func TestDrainMovesAllLeaders(t *testing.T) {
	c := newCluster(t, 10, 3, 6, raftgroup.Limits{})
	for _, g := range c.groups {
		c.elect(g)
	}
	p := c.leader(3)
	done := false
	p.loop.Post(func() { p.host.Drain(func() { done = true }) })
	c.until("the end of the drain", 2*time.Second, func() bool { return done })
	for _, g := range c.groups {
		if p.host.Group(g).Leading() {
			t.Errorf("group %d is still led by the node that drained", g)
		}
	}
	p.crash()
	start := c.world.Now()
	for _, g := range c.groups {
		c.ok(c.propose(c.elect(g), g, 1))
	}
	if d := c.world.Now().Sub(start); d > 200*time.Millisecond {
		t.Errorf("a planned stop stalled for %v", d)
	}
}

func TestFailedLogHaltsTheReplica(t *testing.T) {
	c := newCluster(t, 11, 3, 1, raftgroup.Limits{})
	p := c.elect(1)
	p.logs[1].fail = block.Errorf(block.Internal, "input/output error")
	o := c.propose(p, 1, 1)
	c.until("a halt", time.Second, func() bool { return len(p.failed) > 0 })
	c.until("the end of the proposal", time.Second, func() bool { return o.ended > 0 })
	if o.status != wire.StatusDropped {
		t.Errorf("status %d, want dropped", o.status)
	}
	c.until("another leader", 5*time.Second, func() bool { l := c.leader(1); return l != nil && l != p })
	c.ok(c.propose(c.leader(1), 1, 1))
}

func TestTruncateAndSlowestMatch(t *testing.T) {
	c := newCluster(t, 12, 3, 1, raftgroup.Limits{})
	p := c.elect(1)
	for range 10 {
		c.ok(c.propose(p, 1, 1))
	}
	c.agree(1)
	c.world.RunFor(500 * time.Millisecond)
	at := p.states[1].applied.Index
	for _, q := range c.procs {
		if got := q.host.Group(1).SlowestMatch(); got != at {
			t.Errorf("node %d knows a slowest match of %d, want %d", q.id, got, at)
		}
		q.checkpoint(1)
		done := false
		q.loop.Post(func() { q.host.Group(1).Truncate(at, func(err error) { done = err == nil }) })
		c.until("the truncation", time.Second, func() bool { return done })
		if q.disks[1].first != at+1 {
			t.Errorf("node %d: the log starts at %d, want %d", q.id, q.disks[1].first, at+1)
		}
	}
	c.ok(c.propose(p, 1, 1))
	for _, q := range c.procs {
		q.crash()
		q.start()
	}
	c.ok(c.propose(c.elect(1), 1, 1))
	c.agree(1)
}

func TestLogThatLostAppliedStartsAnew(t *testing.T) {
	c := newCluster(t, 13, 3, 1, raftgroup.Limits{})
	p := c.elect(1)
	for range 10 {
		c.ok(c.propose(p, 1, 1))
	}
	c.agree(1)
	q := c.procs[p.id%3]
	q.checkpoint(1)
	q.crash()
	d := q.disks[1]
	d.ents = d.ents[:3]
	d.hard.Commit = d.first
	q.start()
	c.ok(c.propose(p, 1, 1))
	c.agree(1)
	if d.first <= d.checkpoint.applied.Index {
		t.Errorf("the log starts at %d, not above applied %d", d.first, d.checkpoint.applied.Index)
	}
}

func TestVotesAreDurableBeforeTheyCount(t *testing.T) {
	for seed := range uint64(20) {
		c := newCluster(t, 200+seed, 3, 1, raftgroup.Limits{})
		p := c.elect(1)
		term, votes := p.host.Group(1).Term(), 0
		for _, q := range c.procs {
			if h := q.disks[1].hard; h.Term == term && h.Vote == uint64(p.id) {
				votes++
			}
		}
		if votes < 2 {
			t.Fatalf("seed %d: a leader of term %d with %d votes on disk", seed, term, votes)
		}
	}
}

func TestReadWaitsForApply(t *testing.T) {
	c := newCluster(t, 14, 3, 1, raftgroup.Limits{})
	p := c.elect(1)
	c.ok(c.propose(p, 1, 1))
	// The leader's own disk does not answer: the others commit, it cannot apply.
	p.logs[1].stuck = true
	c.propose(p, 1, 1)
	g := p.host.Group(1)
	c.until("a commit ahead of apply", 200*time.Millisecond, func() bool { return g.Committed() > g.Applied().Index })
	var index uint64
	var ok, done bool
	p.loop.Post(func() { g.ReadIndex(func(i uint64, k bool) { index, ok, done = i, k, true }) })
	c.world.RunFor(150 * time.Millisecond)
	if done {
		t.Fatalf("a read was confirmed (%v) at %d, applied is %d", ok, index, g.Applied().Index)
	}
	p.logs[1].stuck = false
	p.loop.Post(p.logs[1].pump)
	c.until("the read", 100*time.Millisecond, func() bool { return done })
	if !ok || g.Applied().Index < index {
		t.Fatalf("ok %v, index %d, applied %d", ok, index, g.Applied().Index)
	}
}
