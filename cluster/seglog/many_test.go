package seglog

import (
	"testing"
	"time"

	"firn.io/firn/internal/block"
)

// counting counts what the log asks of the index.
type counting struct {
	Owner
	asked int
}

func (c *counting) LiveBlocks(s SegmentID) int { c.asked++; return c.Owner.LiveBlocks(s) }

// countSpace is Space as it is defined: a look at every segment.
func (l *Log) countSpace() (sp Space) {
	for _, s := range l.segs {
		if s.state != missing {
			sp.FileBytes += l.sb.SegmentBytes
		}
		if s.state == sealed || s.state == open {
			live := int64(l.live(s)) * block.Size
			sp.LiveBytes += live
			sp.ClaimedBytes += s.claimBlocks * block.Size
			if s.claims > 0 || s.state == open {
				sp.HeldBytes += l.sb.SegmentBytes
			} else {
				sp.HeldBytes += live
			}
		}
	}
	return sp
}

// TestSpaceCounts compares what is counted as it changes with a look at all.
func TestSpaceCounts(t *testing.T) {
	t.Parallel()
	g := newRig(t, 7, minSegmentBytes, 40)
	g.open()
	for i := range uint64(60) {
		k := ReplicaKey{block.GroupID(i%4 + 1), 1}
		if i < 4 {
			g.create(k)
		}
		g.append(k, g.reps[k].now().last()+1, 5, 10)
		g.run(2 * time.Millisecond)
		for _, k := range g.keys {
			g.apply(k)
		}
		if i%3 == 0 {
			g.checkpoint()
			for _, k := range g.keys {
				g.truncate(k, uint64(i%5))
			}
		}
		if i == 40 {
			g.loop.Kill()
			g.open()
		}
		g.run(10 * time.Millisecond)
		got, want := g.log.Space(), g.log.countSpace()
		if got.FileBytes != want.FileBytes || got.LiveBytes != want.LiveBytes || got.ClaimedBytes != want.ClaimedBytes || got.HeldBytes != want.HeldBytes {
			t.Fatalf("step %d: %+v, counted %+v", i, got, want)
		}
		ready, made := 0, 0
		for _, s := range g.log.segs {
			if s.state == free {
				ready++
			} else if s.state != missing {
				made++
			}
		}
		if r, p := g.log.usable(); r != ready || p != max(ready, g.log.maxSegments-made) && !g.log.space.full {
			t.Fatalf("step %d: %d and %d segments are usable, counted %d and %d", i, r, p, ready, g.log.maxSegments-made)
		}
	}
}

// TestManySegments: on a disk of very many segments what is asked for at every turn
// looks at few of them, and a state table is as large as what is in use.
func TestManySegments(t *testing.T) {
	t.Parallel()
	const many = 100_000
	g := newRig(t, 1, minSegmentBytes, 2*many)
	g.open()
	k := ReplicaKey{1, 1}
	g.create(k)
	g.append(k, 11, 5, 4)
	g.run(time.Millisecond)
	l := g.log
	for i := range many { // that hold data which nobody has written
		l.segs = append(l.segs, &segment{id: SegmentID(len(l.segs) + 1), state: sealed, generation: uint64(i + 1), last: uint64(i + 1)})
	}
	l.count()
	c := &counting{Owner: l.owner}
	l.owner = c
	if l.Space(); c.asked > 4 {
		t.Errorf("Space asked for %d of %d segments", c.asked, many)
	}
	c.asked = 0
	for range 20 {
		g.loop.Post(func() { l.rest(); l.Space(); l.Stalled() })
		g.append(k, g.reps[k].now().last()+1, 5, 1)
		g.run(time.Millisecond)
	}
	if c.asked > many/10 {
		t.Errorf("%d segments were asked for by 20 writes", c.asked)
	}
	if n := l.tableBlocks(); n > 2 {
		t.Errorf("a state table takes %d blocks", n)
	}
	l.segs = l.segs[:len(l.segs)-many]
	l.count()
	l.owner = c.Owner
}

// TestTooManyClaims: with more claimed segments than a state table may name nothing
// is lost: entries wait until claims have ended.
func TestTooManyClaims(t *testing.T) {
	t.Parallel()
	g := newRig(t, 1, 8<<20, 40)
	g.open()
	k := ReplicaKey{1, 1}
	g.create(k)
	g.append(k, 11, 5, 4)
	g.run(time.Millisecond)
	l := g.log
	real := len(l.segs)
	claim := func(n int) {
		for range n {
			s := &segment{id: SegmentID(len(l.segs) + 1), state: sealed, generation: 1, last: 1, claims: 1}
			l.segs = append(l.segs, s)
			l.claimed[s.id] = s
		}
		l.maxSegments += n
		l.count()
	}
	claim(24_000)
	for i := range uint64(600) { // 8 MiB and more
		g.append(k, 15+10*i, 5, 10)
	}
	g.run(time.Second)
	if !l.Stalled() || l.w.open[fresh] == nil {
		t.Fatalf("entries go on with %d claimed segments: stalled %v", len(l.claimed), l.Stalled())
	}
	for _, s := range l.segs[real:] {
		delete(l.claimed, s.id)
	}
	l.segs = l.segs[:real]
	l.maxSegments -= 24_000
	l.count()
	g.run(time.Second)
	if l.Stalled() {
		t.Fatal("entries still wait")
	}
	g.verify()
	g.loop.Kill()
	g.open()
}

// TestVoidsOfManySegments: what a recovery voids on a disk with very many free
// segments takes few bytes, for ever so many recoveries, and ends once all were used.
func TestVoidsOfManySegments(t *testing.T) {
	t.Parallel()
	g := newRig(t, 1, minSegmentBytes, 400)
	g.open()
	k := ReplicaKey{1, 1}
	g.create(k)
	for i := range uint64(300) {
		g.append(k, g.reps[k].now().last()+1, 5, 10)
		g.run(time.Millisecond)
		if i%60 == 59 {
			g.apply(k)
		}
	}
	g.apply(k)
	g.checkpoint()
	g.truncate(k, 0)
	g.run(time.Millisecond)
	for range 20 {
		g.loop.Kill()
		g.open()
	}
	if free := g.log.counts[free]; free <= maxVoidSegments {
		t.Fatalf("the script must leave many free segments, not %d", free)
	}
	if n := len(g.log.w.voids); n > 20*2 {
		t.Errorf("20 recoveries have left %d voids", n)
	}
	for _, s := range g.log.segs {
		if s.state == free {
			s.last, s.generation = g.log.w.number, g.log.w.number
		}
	}
	for range 10 {
		g.append(k, g.reps[k].now().last()+1, 5, 10)
		g.run(10 * time.Millisecond)
	}
	if n := len(g.log.w.voids); n != 0 {
		t.Errorf("%d voids are left after all segments were used", n)
	}
}
