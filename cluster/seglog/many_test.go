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
