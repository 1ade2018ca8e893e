package seglog

import (
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"pgregory.net/rapid"

	"firn.io/firn/internal/block"
)

// TestModel drives a log by chance through writes, overwritten tails,
// truncations, collection, crashes at any call of the disk, and reopens it.
func TestModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) { driveModel(t, rapid.IntRange(10, 120).Draw(t, "steps")) })
}

// TestModelLong is the same over longer histories, with plain seeds.
func TestModelLong(t *testing.T) {
	seeds := 6
	if os.Getenv("FIRN_TEST_LONG") != "" {
		seeds = 300
	}
	for seed := range seeds {
		rnd := rand.New(rand.NewPCG(uint64(seed), 5))
		g := newRig(t, uint64(seed), minSegmentBytes, 24)
		g.open()
		g.create(ReplicaKey{1, 1})
		for range 1500 {
			step(g, rnd.IntN)
		}
		g.run(time.Second)
		g.verify()
	}
}

func driveModel(t *rapid.T, steps int) {
	g := newRig(t, rapid.Uint64().Draw(t, "seed"), minSegmentBytes, 24)
	g.open()
	g.create(ReplicaKey{1, 1})
	pick := func(n int) int { return rapid.IntRange(0, n-1).Draw(t, "pick") }
	for range steps {
		step(g, pick)
	}
	g.run(time.Second)
	g.verify()
}

// step is one thing that can happen; pick(n) draws from 0..n-1.
func step(g *rig, pick func(int) int) {
	if g.failed != nil {
		g.t.Fatalf("the disk failed: %v", g.failed)
	}
	if len(g.keys) == 0 {
		g.create(ReplicaKey{1, g.nextReplica()})
		g.run(10 * time.Millisecond)
	}
	k := g.keys[pick(len(g.keys))]
	if g.log.Shortage() { // as a node does, which writes nothing then (S7)
		g.run(10 * time.Millisecond)
		for _, k := range g.keys {
			g.apply(k)
		}
		g.checkpoint()
		for _, k := range g.keys {
			g.truncate(k, 0)
		}
		g.run(200 * time.Millisecond)
		g.checkpoint()
		g.run(200 * time.Millisecond)
	}
	s := g.reps[k].now()
	what := pick(20)
	if what < 7 && g.log.Shortage() {
		what = 9
	}
	switch what {
	case 0, 1, 2, 3, 4:
		g.append(k, s.last()+1, s.term(s.last()), 1+pick(6))
	case 5, 6: // a new leader overwrites what is not applied
		from := max(g.index.now.applied[k].Index, s.trunc.Index) + 1
		if from <= s.last() {
			first := from + uint64(pick(int(s.last()-from+1)))
			g.append(k, first, s.term(s.last())+1, 1+pick(3))
		}
	case 7:
		g.write(k, Write{HardState: &HardState{Term: s.hard.Term + 1, Vote: uint64(1 + pick(3)), Commit: s.hard.Commit}})
	case 8:
		w := Write{Entries: []Entry{makeEntry(k, EntryID{s.last() + 1, s.term(s.last())})}}
		w.HardState = &HardState{Term: s.hard.Term, Vote: s.hard.Vote, Commit: s.last() + 1}
		g.write(k, w)
	case 9, 10:
		g.apply(k)
	case 11:
		g.run(10 * time.Millisecond)
		g.apply(k)
		g.checkpoint()
	case 12, 13:
		g.checkpoint()
		g.truncate(k, uint64(pick(3)))
	case 14:
		g.run(time.Duration(1+pick(300)) * time.Millisecond)
	case 15:
		if len(g.keys) < 4 {
			g.create(ReplicaKey{1, g.nextReplica()})
		}
	case 16:
		if len(g.keys) > 1 && pick(4) == 0 {
			g.remove(k)
		}
	case 17, 18:
		if pick(4) != 0 {
			g.run(time.Duration(pick(3000)) * time.Microsecond)
			break
		}
		g.killAt(pick(12))
		for range 3 {
			n := g.reps[k].now()
			g.append(k, n.last()+1, n.term(n.last()), 1+pick(4))
			g.run(time.Duration(pick(500)) * time.Microsecond)
		}
		g.run(time.Duration(pick(20)) * time.Millisecond)
		g.crash(rand.New(rand.NewPCG(uint64(pick(1<<30)), 1)))
		g.open()
		g.verify()
	case 19:
		if pick(6) == 0 {
			g.close()
			g.open()
			g.verify()
		}
	}
}

func (g *rig) nextReplica() (id block.ReplicaID) {
	g.replicas++
	return block.ReplicaID(g.replicas + 1)
}
