package cluster

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"
	"time"

	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
)

// TestRetriesAreIdentical: whatever happens to the attempts, each carries the
// same command and payload (W3), and none ends the operation but apply (W4).
func TestRetriesAreIdentical(t *testing.T) {
	for name, trouble := range map[string]func(s *scripted, a asked){
		"dropped":        func(s *scripted, a asked) { a.reply(wire.Response{Status: wire.StatusDropped}) },
		"busy":           func(s *scripted, a asked) { a.reply(wire.Response{Status: wire.StatusBusy}) },
		"not ready":      func(s *scripted, a asked) { a.reply(wire.Response{Status: wire.StatusNotReady}) },
		"no replica":     func(s *scripted, a asked) { a.reply(wire.Response{Status: wire.StatusUnknownGroup}) },
		"stale layout":   func(s *scripted, a asked) { a.reply(wire.Response{Status: wire.StatusStaleLayout, NewLayout: 2}) },
		"damaged":        func(s *scripted, a asked) { a.reply(wire.Response{Status: wire.StatusCorrupt}) },
		"unknown leader": func(s *scripted, a asked) { a.reply(wire.Response{Status: wire.StatusNotLeader}) },
		"wrong leader":   func(s *scripted, a asked) { a.reply(wire.Response{Status: wire.StatusNotLeader, Leader: a.node%3 + 1}) },
		"silence":        func(s *scripted, a asked) {},
		"cut":            func(s *scripted, a asked) { s.cut(a.node) },
		"beyond window":  func(s *scripted, a asked) { answer1(a, wire.OutcomeBeyondWindow) },
		"below floor":    func(s *scripted, a asked) { answer1(a, wire.OutcomeBelowFloor) },
	} {
		t.Run(name, func(t *testing.T) {
			s := newScripted(t, 1<<30)
			a := s.attach()
			attempts := 0
			s.script = func(q asked) bool {
				if q.req.Kind != wire.ReqPropose {
					return false
				}
				if attempts++; attempts > 5 {
					return false
				}
				trouble(s, q)
				return true
			}
			began, before := s.Now(), s.client.Counters()
			o := s.write(a, 3, 5, 0xab)
			s.until("write", func() bool { return o.ended })
			if o.err != nil {
				t.Fatal(o.err)
			}
			after := s.client.Counters()
			ops := s.contentOps()
			if len(ops) < 6 {
				t.Errorf("%d attempts", len(ops))
			}
			if n := after.CommandRetries - before.CommandRetries; int(n) != len(ops)-1 {
				t.Errorf("%d retries were counted after %d attempts", n, len(ops))
			}
			if count := troubleCounters[name]; count != nil && count(after)-count(before) < 5 {
				t.Errorf("%+v, before %+v", after, before)
			}
			for _, op := range ops {
				if !bytes.Equal(op.bytes, ops[0].bytes) || !bytes.Equal(op.data, bytes.Repeat([]byte{0xab}, block.Size)) {
					t.Errorf("attempts differ: %+v and %+v", op.req.Command, ops[0].req.Command)
				}
			}
			if took := s.Now().Sub(began); took > 8*time.Second {
				t.Errorf("took %v", took)
			}
			if len(s.client.calls) != 0 || s.client.first != nil {
				t.Error("calls are left")
			}
		})
	}
}

// troubleCounters count the troubles of TestRetriesAreIdentical.
var troubleCounters = map[string]func(Counters) uint64{
	"dropped":        func(c Counters) uint64 { return c.Dropped },
	"busy":           func(c Counters) uint64 { return c.Busy },
	"not ready":      func(c Counters) uint64 { return c.NotReady },
	"no replica":     func(c Counters) uint64 { return c.NotReady },
	"stale layout":   func(c Counters) uint64 { return c.StaleLayouts },
	"damaged":        func(c Counters) uint64 { return c.Corrupt },
	"unknown leader": func(c Counters) uint64 { return c.Redirects },
	"wrong leader":   func(c Counters) uint64 { return c.Redirects },
	"silence":        func(c Counters) uint64 { return c.Lost },
	"cut":            func(c Counters) uint64 { return c.Lost },
}

func answer1(a asked, o wire.Outcome) {
	a.reply(wire.Response{Status: wire.StatusOK, Result: wire.ApplyResult{Outcome: o}})
}

// TestLeaderFailsOver: with a silent leader everything in flight goes to the new
// one within the stall limit.
func TestLeaderFailsOver(t *testing.T) {
	s := newScripted(t, 1<<30)
	a := s.attach()
	var outs []*outcome
	for i := range 64 {
		outs = append(outs, s.write(a, block.Chunk(i%8), block.Index(i), byte(i)))
	}
	dead := s.groups[1].leader
	s.RunFor(100 * time.Microsecond)
	s.silent[dead] = true
	began := s.Now()
	s.At(s.Now().Add(700*time.Millisecond), func() {
		for _, g := range s.groups {
			if g.leader == dead {
				g.leader = dead%3 + 1
			}
		}
	})
	s.until("writes", func() bool {
		for _, o := range outs {
			if !o.ended {
				return false
			}
		}
		return true
	})
	if stall := s.Now().Sub(began); stall > 3*time.Second {
		t.Errorf("stall of %v", stall)
	}
	for _, o := range outs {
		if o.err != nil {
			t.Error(o.err)
		}
	}
	// Nobody asks the dead node again while others answer.
	before := len(s.log)
	for i := range 20 {
		o := s.write(a, 0, block.Index(i), 1)
		s.until("write", func() bool { return o.ended })
	}
	for _, q := range s.log[before:] {
		if q.node == dead {
			t.Error("the dead node was asked again")
		}
	}
}

// TestNodesThatNameOneAnother as leader are not asked in a circle.
func TestNodesThatNameOneAnother(t *testing.T) {
	s := newScripted(t, 1<<30)
	a := s.attach()
	attempts := 0
	s.script = func(q asked) bool {
		attempts++
		q.reply(wire.Response{Status: wire.StatusNotLeader, Leader: q.node%3 + 1})
		return true
	}
	var outs []*outcome
	for i := range 20 {
		outs = append(outs, s.write(a, 0, block.Index(i), 1))
	}
	s.RunFor(time.Second)
	if attempts > 1500 { // 3 nodes, 20 writes, 20 ticks, and the first round
		t.Errorf("%d attempts in a second", attempts)
	}
	s.script = nil
	s.until("writes", func() bool {
		for _, o := range outs {
			if !o.ended {
				return false
			}
		}
		return true
	})
}

// TestRefusals: what apply refuses ends an operation with its kind.
func TestRefusals(t *testing.T) {
	for o, kind := range map[wire.Outcome]block.Kind{
		wire.OutcomeOutOfRange: block.OutOfRange, wire.OutcomeReadOnly: block.ReadOnly, wire.OutcomeInvalid: block.Internal,
		wire.OutcomeOldGeneration: block.Internal,
	} {
		s := newScripted(t, 1<<30)
		a := s.attach()
		s.script = func(q asked) bool {
			answer1(q, o)
			return true
		}
		got := s.write(a, 0, 0, 1)
		s.until("write", func() bool { return got.ended })
		if !errors.Is(got.err, kind) {
			t.Errorf("outcome %d: %v, want kind %q", o, got.err, kind)
		}
		s.script = nil
		got = s.write(a, 0, 0, 1)
		s.until("write", func() bool { return got.ended })
		ops := s.contentOps()
		if last := ops[len(ops)-1].req.Command; got.err != nil || last.OpSeq != 2 || last.Floor != 2 {
			t.Errorf("after outcome %d: %v, opSeq %d floor %d", o, got.err, last.OpSeq, last.Floor)
		}
	}
}

// TestNoSpace ends a write that cannot have been proposed, and no other.
func TestNoSpace(t *testing.T) {
	s := newScripted(t, 1<<30)
	a := s.attach()
	full := true
	s.script = func(q asked) bool {
		if full {
			q.reply(wire.Response{Status: wire.StatusNoSpace})
		}
		return full
	}
	o := s.write(a, 0, 0, 1)
	s.until("write", func() bool { return o.ended })
	if !errors.Is(o.err, block.NoSpace) {
		t.Fatal(o.err)
	}
	first := true
	s.script = func(q asked) bool {
		if first {
			first = false
			q.reply(wire.Response{Status: wire.StatusDropped})
			return true
		}
		if full {
			q.reply(wire.Response{Status: wire.StatusNoSpace})
		}
		return full
	}
	o = s.write(a, 0, 0, 1)
	s.RunFor(time.Second)
	if o.ended {
		t.Fatalf("a write of unknown outcome ended: %v", o.err)
	}
	full = false
	s.until("write", func() bool { return o.ended })
	if o.err != nil {
		t.Error(o.err)
	}
}

// TestWindow: with the first operation unanswered, the 4096th beyond it waits;
// answers out of order raise the floor only as far as all below are answered.
func TestWindow(t *testing.T) {
	s := newScripted(t, 1<<40)
	a := s.attach()
	var held asked
	highest := block.OpSeq(0)
	s.script = func(q asked) bool {
		c := &q.req.Command
		highest = max(highest, c.OpSeq)
		if c.OpSeq >= c.Floor+wire.OpWindow {
			t.Errorf("opSeq %d at floor %d", c.OpSeq, c.Floor)
		}
		if c.OpSeq == 1 {
			held = q
			return true
		}
		return false
	}
	ended := 0
	const total = wire.OpWindow + 500
	s.loop.Post(func() {
		for i := range total {
			p, crcs := blockOf(1)
			a.Write(block.Chunk(i/1000*testGroups), block.Index(i%1000), p, crcs, func(err error) {
				if err != nil {
					t.Error(err)
				}
				ended++
			})
		}
	})
	// The held call is lost after a while and sent again, which is held again.
	s.until("a full window", func() bool { return ended == wire.OpWindow-1 })
	s.RunFor(5 * time.Second)
	if highest != wire.OpWindow || ended != wire.OpWindow-1 {
		t.Errorf("highest opSeq %d, %d ended", highest, ended)
	}
	s.script = nil
	held.reply(wire.Response{Status: wire.StatusOK, Result: wire.ApplyResult{Outcome: wire.OutcomeApplied}})
	s.until("the rest", func() bool { return ended == total })
	st := a.stream(0)
	if st.floor != total+1 || st.next != total+1 || st.head != nil || st.ended != [wire.OpWindow / 64]uint64{} {
		t.Errorf("floor %d, next %d", st.floor, st.next)
	}
}

// TestFloorNeverPassesAnUnansweredOp settles in random order.
func TestFloorNeverPassesAnUnansweredOp(t *testing.T) {
	for seed := range uint64(30) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		s := newScripted(t, 1<<40)
		a := s.attach()
		var open []asked
		s.script = func(q asked) bool {
			open = append(open, q)
			return true
		}
		sent := 0
		for range 400 {
			if rnd.IntN(2) == 0 {
				sent++
				s.write(a, 0, block.Index(sent%1000), 1)
			}
			s.RunFor(time.Millisecond)
			if len(open) > 0 && rnd.IntN(3) > 0 {
				i := rnd.IntN(len(open))
				q := open[i]
				open = append(open[:i], open[i+1:]...)
				answer1(q, wire.OutcomeApplied)
				s.RunFor(time.Millisecond)
			}
			floor := a.stream(0).floor
			for _, q := range open {
				if q.req.Command.OpSeq < floor {
					t.Fatalf("seed %d: floor %d passed opSeq %d", seed, floor, q.req.Command.OpSeq)
				}
			}
			if len(open) == 0 && floor != block.OpSeq(sent+1) {
				t.Fatalf("seed %d: floor %d after %d operations", seed, floor, sent)
			}
		}
	}
}

// TestMarkReachesEachGroupOnce, whatever chunks it covers.
func TestMarkReachesEachGroupOnce(t *testing.T) {
	const size = 2<<40 + 3*block.ChunkBytes
	for _, c := range []struct {
		from, to block.Chunk
		groups   int
	}{{0, 1, 1}, {1, 3, 2}, {0, 400000, testGroups}, {block.ChunksPerSpan - 1, block.ChunksPerSpan + 1, 2}, {0, 2*block.ChunksPerSpan + 3, testGroups}} {
		s := newScripted(t, size)
		a := s.attach()
		o := &outcome{}
		s.loop.Post(func() { a.Mark(c.from, c.to, o.done) })
		s.until("mark", func() bool { return o.ended })
		seen := map[block.GroupID]bool{}
		for _, q := range s.contentOps() {
			if cmd := q.req.Command; cmd.Type != wire.CmdMark || cmd.Chunk != c.from || cmd.ToChunk != c.to {
				t.Errorf("%+v", cmd)
			}
			if q.node == s.groups[q.req.Group].leader {
				if seen[q.req.Group] {
					t.Errorf("group %d was told twice", q.req.Group)
				}
				seen[q.req.Group] = true
			}
		}
		if o.err != nil || len(seen) != c.groups {
			t.Errorf("mark of %d to %d: %v, %d groups, want %d", c.from, c.to, o.err, len(seen), c.groups)
		}
	}
}

// TestBeyondTheEnd is refused before anything is sent, and gives buffers back.
func TestBeyondTheEnd(t *testing.T) {
	s := newScripted(t, 10<<20)
	a := s.attach()
	before := len(s.log)
	outs := []*outcome{s.write(a, 2, 512, 1), s.write(a, 9, 0, 1), {}, {}}
	s.loop.Post(func() {
		a.Zero(2, 511, 2, outs[2].done)
		a.Mark(0, 4, outs[3].done)
	})
	s.RunFor(time.Second)
	for i, o := range outs {
		if !errors.Is(o.err, block.OutOfRange) {
			t.Errorf("%d: %v", i, o.err)
		}
	}
	if len(s.log) != before {
		t.Error("something was sent")
	}
}
