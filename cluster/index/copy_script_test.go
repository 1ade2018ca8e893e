package index_test

import (
	"testing"

	"firn.io/firn/cluster/index"
	"firn.io/firn/cluster/index/memstore"
	"firn.io/firn/cluster/seglog"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
)

// copyFrom fills g from another replica of its group. step is called between
// two steps; it ends the copy when it returns false, as a crash would.
func (g *group) copyFrom(from *group, step func() bool) bool {
	g.t.Helper()
	if _, mixed := g.r.Installing(); !mixed && g.r.Unmerged() {
		g.checkpoint()
	}
	g.flush()
	if from.r.Unmerged() {
		from.checkpoint()
	}
	view := from.r.View()
	defer view.Release()
	c := g.r.NewCopy()
	scan := func(from, to []byte, take func([]index.Record) error) {
		g.t.Helper()
		for from != nil {
			recs, next, err := view.Scan(from, to, 300)
			if err == nil {
				err = take(recs)
			}
			if err != nil {
				g.t.Fatal(err)
			}
			from = next
		}
	}
	a, b := index.HeadRange()
	scan(a, b, c.Head)
	if _, _, _, err := c.HeadDone(); err != nil {
		g.t.Fatal(err)
	}
	a, b = index.TableRange()
	scan(a, b, c.Table)
	c.TableDone()
	do := func(j *index.Job) bool {
		j.Run()
		if !step() {
			return false
		}
		if err := j.Finish(); err != nil {
			g.t.Fatal(err)
		}
		return step()
	}
	if !do(c.Begin()) {
		return false
	}
	for {
		for _, id := range c.Next(1) {
			a, b := id.Range()
			scan(a, b, func(recs []index.Record) error { return c.Extents(id, recs) })
		}
		if c.Ended() {
			break
		}
		if !do(c.Compare()) {
			return false
		}
		needs := c.Needs()
		for i := range needs {
			n := len(needs[i].Record.CRCs)
			c.Placed(&needs[i], 0, n, g.at)
			g.at.Block += uint16(n)
		}
		if !step() || !do(c.Replace()) {
			return false
		}
	}
	if !do(c.Finish()) {
		return false
	}
	g.flush()
	return true
}

func (g *group) sum() uint64 {
	g.t.Helper()
	d, err := g.r.Digest()
	if err != nil {
		g.t.Fatal(err)
	}
	return d
}

func (g *group) at0(c block.Chunk, gen block.Generation, kind wire.CommandType) wire.Command {
	cmd := g.next(write(1, 0, 0, 0))
	cmd.Type, cmd.Chunk, cmd.Generation = kind, c, gen
	if kind == wire.CmdMark {
		cmd.Count, cmd.CRCs, cmd.PayloadBytes, cmd.ToChunk = 0, nil, 0, c+4
	}
	return cmd
}

// pair is two replicas that have applied the same: data of generation 0 under a
// marker of generation 1.
func pair(t testing.TB) (a, b *group) {
	gs := [2]*group{newGroup(t, memstore.New()), newGroup(t, memstore.New())}
	for _, g := range gs {
		g.want(wire.OutcomeApplied, fence(1, 1))
		for c := range block.Chunk(4) {
			g.want(wire.OutcomeApplied, g.at0(c, 0, wire.CmdWrite))
		}
		g.want(wire.OutcomeApplied, g.at0(0, 1, wire.CmdMark))
		g.checkpoint()
		g.flush()
	}
	return gs[0], gs[1]
}

// ahead is what b misses.
func ahead(a *group) {
	for c := range block.Chunk(2) {
		cmd := a.at0(c, 1, wire.CmdWrite)
		cmd.Block = 5
		a.want(wire.OutcomeApplied, cmd)
	}
	cmd := a.at0(9, 1, wire.CmdWrite)
	a.want(wire.OutcomeApplied, cmd)
}

// The receiver's reaper was in the middle of a marker. What the copy brings of
// the part that it had done lies under that marker, too.
func TestCopyBelowTheReapersPlace(t *testing.T) {
	t.Parallel()
	a, b := pair(t)
	b.do(b.r.StartReap(1))
	if b.r.Pending().Markers != 1 {
		t.Fatal("the reaper is not in the middle")
	}
	ahead(a)
	b.copyFrom(a, func() bool { return true })
	for job := b.r.StartReap(100); job != nil; job = b.r.StartReap(100) {
		b.do(job)
	}
	if b.r.Pending().Markers != 0 {
		t.Fatal("the marker was not retired")
	}
	for c := range block.Chunk(4) {
		if at := b.writtenAt(c, 0); at != 0 {
			t.Errorf("chunk %d: what was trimmed is back, written by %d", c, at)
		}
	}
	if a.sum() != b.sum() {
		t.Error("the digests differ")
	}
	if err := b.db.CheckLive(false); err != nil {
		t.Error(err)
	}
}

// A crash after any step, with any prefix of what was not flushed, ends in a
// replica that a copy from the same source completes.
func TestCopyCrashesAnywhere(t *testing.T) {
	t.Parallel()
	crashes := 0
	for at := 0; ; at++ {
		done := false
		for kept := 0; ; kept++ {
			a, b := pair(t)
			ahead(a)
			steps := 0
			done = b.copyFrom(a, func() bool { steps++; return steps <= at })
			unflushed := b.store.(*memstore.Store).Unflushed()
			if done || kept > unflushed {
				break
			}
			crashes++
			next := newGroup(t, b.store.(*memstore.Store).Crash(kept))
			next.at = seglog.Location{Segment: b.at.Segment + 1}
			if target, mixed := next.r.Installing(); mixed {
				if applied, _ := a.r.Applied(); target != applied || next.r.View() != nil || next.r.StartReap(1) != nil {
					t.Fatalf("after step %d: a mixture that is served, or to go on at %d", at, target)
				}
			}
			a.want(wire.OutcomeApplied, a.at0(9, 1, wire.CmdWrite)) // and not what came before
			next.copyFrom(a, func() bool { return true })
			if a.sum() != next.sum() {
				t.Fatalf("after step %d, %d batches kept: the digests differ", at, kept)
			}
			if err := next.db.CheckLive(false); err != nil {
				t.Fatalf("after step %d, %d batches kept: %v", at, kept, err)
			}
		}
		if done {
			break
		}
	}
	if crashes < 40 {
		t.Errorf("%d crashes", crashes)
	}
	t.Logf("%d crashes", crashes)
}
