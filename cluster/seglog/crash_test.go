package seglog

import (
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"firn.io/firn/internal/block"
)

// scripts are small workloads whose every call of the disk is a place to crash.
var scripts = map[string]func(g *rig){
	"appends": func(g *rig) {
		k := ReplicaKey{1, 1}
		g.create(k)
		g.run(time.Millisecond)
		for i := range uint64(4) {
			g.append(k, 11+2*i, 5, 2)
			g.run(time.Millisecond)
		}
	},
	"overwritten tail and truncation": func(g *rig) {
		k := ReplicaKey{1, 1}
		g.create(k)
		g.append(k, 11, 5, 6)
		g.run(5 * time.Millisecond)
		g.append(k, 14, 6, 2)
		g.write(k, Write{HardState: &HardState{6, 2, 12}})
		g.run(5 * time.Millisecond)
		if g.failed != nil {
			return
		}
		g.apply(k)
		g.checkpoint()
		g.write(k, Write{Truncate: &EntryID{12, 5}})
		g.append(k, 16, 6, 3)
		g.run(5 * time.Millisecond)
	},
	"a log emptied by a truncation": func(g *rig) {
		k := ReplicaKey{1, 1}
		g.create(k)
		g.append(k, 11, 5, 3)
		g.run(5 * time.Millisecond)
		if g.failed != nil {
			return
		}
		g.index.now.applied[k] = EntryID{40, 7} // as after a copy of the state
		g.checkpoint()
		g.write(k, Write{Truncate: &EntryID{40, 7}})
		g.append(k, 41, 7, 2)
		g.run(5 * time.Millisecond)
	},
	"replicas come and go": func(g *rig) {
		a, b := ReplicaKey{1, 1}, ReplicaKey{2, 1}
		g.create(a)
		g.create(b)
		g.append(a, 11, 5, 2)
		g.append(b, 11, 5, 2)
		g.run(5 * time.Millisecond)
		g.remove(a)
		g.append(b, 13, 5, 1)
		g.run(5 * time.Millisecond)
	},
	"over several segments": func(g *rig) {
		k := ReplicaKey{1, 1}
		g.create(k)
		for i := range uint64(12) {
			g.append(k, 11+4*i, 5, 4)
			g.run(2 * time.Millisecond)
			if g.failed != nil {
				return
			}
			g.apply(k)
			g.checkpoint()
			if i%4 == 3 {
				g.truncate(k, 2)
			}
		}
		g.run(5 * time.Millisecond)
	},
	"votes, and nothing else": func(g *rig) {
		for i := range 36 { // so many that a state table is torn across sectors
			g.create(ReplicaKey{block.GroupID(i + 1), 1})
		}
		for i := range uint64(40) {
			g.write(g.keys[i%36], Write{HardState: &HardState{1000 + i, 1 + i%3, 10}})
			g.run(500 * time.Microsecond)
		}
	},
	"a write over two segments": func(g *rig) {
		k := ReplicaKey{1, 1}
		g.create(k)
		g.append(k, 11, 5, 3)
		g.run(5 * time.Millisecond)
		w := Write{HardState: &HardState{6, 2, 45}}
		for i := range uint64(32) {
			w.Entries = append(w.Entries, makeEntry(k, EntryID{14 + i, 6}))
		}
		g.write(k, w)
		g.run(10 * time.Millisecond)
	},
	"idle work": func(g *rig) {
		k := ReplicaKey{1, 1}
		g.create(k)
		g.run(400 * time.Millisecond)
		g.append(k, 11, 5, 2)
		g.run(5 * time.Millisecond)
	},
}

// What TestCrashAtEveryCall promises: fewer scripts or crashes fail it.
const (
	crashScripts = 20
	crashSubsets = 8 // of the sectors in flight, per call
	// crashThinned is every how many calls is a place to crash in the short run;
	// where it begins differs from script to script. The long one takes each.
	crashThinned    = 7
	crashesShort    = 1500
	crashesLong     = 13000
	crashCallsLeast = 20 // of each script
)

// TestCrashAtEveryCall switches the power off at each call of the disk, from
// the first open on, and reopens on several outcomes of what was in flight;
// then once more, to see that a recovery that is cut short loses nothing.
func TestCrashAtEveryCall(t *testing.T) {
	subsets, step, promised := uint64(crashSubsets), crashThinned, int64(crashesShort)
	if os.Getenv("FIRN_TEST_LONG") != "" {
		subsets, step, promised = 2*crashSubsets, 1, crashesLong
	}
	all := maps.Clone(scripts)
	maps.Copy(all, moreScripts)
	var calls, crashes atomic.Int64
	names := slices.Sorted(maps.Keys(all))
	t.Run("scripts", func(t *testing.T) {
		for i, name := range names {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				for at := i % step; ; at += step {
					finished := true
					for seed := range subsets {
						finished = crashOnce(t, all[name], at, seed) && finished
					}
					if finished {
						if at < crashCallsLeast {
							t.Errorf("the script makes %d calls of the disk, too few", at)
						}
						calls.Add(int64(at))
						return
					}
					crashes.Add(int64(subsets))
				}
			})
		}
	})
	t.Logf("measured: %d scripts of the log, %d calls of the disk, power cut at every %d. call with %d subsets of sectors each: %d crashes",
		len(names), calls.Load(), step, subsets, crashes.Load())
	if len(names) < crashScripts || crashes.Load() < promised {
		t.Errorf("promised are %d scripts and %d crashes", crashScripts, promised)
	}
}

// crashOnce returns true when the script ended before the power did.
func crashOnce(t *testing.T, script func(*rig), at int, seed uint64) (finished bool) {
	g := newRig(t, seed, minSegmentBytes, 12)
	rnd := rand.New(rand.NewPCG(seed, uint64(at)))
	g.killAt(at)
	if err := g.tryOpen(); err == nil {
		g.start()
		script(g)
		finished = !g.dead()
		g.loop.Kill()
	}
	g.fs = g.fs.Crash(rnd)
	// A second loss of power, during recovery.
	g.killAt(rnd.IntN(30))
	if err := g.tryOpen(); err == nil {
		g.loop.Kill()
	}
	g.fs = g.fs.Crash(rnd)
	g.open()
	g.verify()
	for _, k := range g.keys {
		s := g.reps[k].now()
		g.append(k, s.last()+1, s.term(s.last()), 3)
	}
	g.run(time.Second)
	g.close()
	g.open()
	for _, k := range g.keys {
		if m := g.reps[k]; len(m.states) != 1 || m.now().last() < 13 || m.now().hard.Commit > m.now().last() {
			t.Fatalf("%v ends at %d", k, m.now().last())
		}
	}
	return finished
}

// TestRandomOverwriteStaysBounded overwrites a small volume many times over on
// a disk of a few times its size: collection must keep up, and the blocks stay.
func TestRandomOverwriteStaysBounded(t *testing.T) {
	g := newRig(t, 1, 512<<10, 24)
	g.open()
	k := ReplicaKey{1, 1}
	g.create(k)
	g.run(time.Millisecond)
	written := int64(0)
	for round := range 700 {
		s := g.reps[k].now()
		g.append(k, s.last()+1, 5, 8)
		g.run(time.Millisecond)
		g.apply(k)
		if round%16 == 15 {
			g.checkpoint()
			g.truncate(k, 4)
		}
	}
	g.run(time.Second)
	g.verify()
	st := g.log.Stats()
	written = int64(st.PayloadBytes)
	sp := g.log.Space()
	if written < 2*sp.TotalBytes {
		t.Fatalf("the test wrote %d bytes, too little for a disk of %d", written, sp.TotalBytes)
	}
	if sp.FileBytes > sp.TotalBytes || sp.FreeBytes == 0 || st.Stalls > 0 || sp.ReusedBytes == 0 {
		t.Fatalf("space %+v, stats %+v", sp, st)
	}
	g.close()
	g.open()
	g.verify()
}

// TestSurvivorsAreMoved fills segments that are partly overwritten, so that
// only moving makes room.
func TestSurvivorsAreMoved(t *testing.T) {
	g := newRig(t, 1, minSegmentBytes, 20)
	g.open()
	// Many replicas write once and stay; one writes on and on among them.
	busy := ReplicaKey{99, 1}
	g.create(busy)
	g.run(time.Millisecond)
	for i := range 60 {
		if i%6 == 0 && i < 50 {
			k := ReplicaKey{block.GroupID(i + 1), 1}
			g.create(k)
			g.append(k, 11, 5, 3)
		}
		s := g.reps[busy].now()
		g.append(busy, s.last()+1, 5, 10)
		g.run(2 * time.Millisecond)
		for _, k := range g.keys {
			g.apply(k)
		}
		g.checkpoint()
		for _, k := range g.keys {
			g.truncate(k, 0)
		}
		g.run(10 * time.Millisecond)
	}
	g.run(time.Second)
	g.verify()
	if st := g.log.Stats(); st.MoveBlocks == 0 || st.Stalls > 0 || g.index.moved == 0 {
		t.Fatalf("%+v, %d moved", st, g.index.moved)
	}
	g.close()
	g.open()
	g.verify()
}
