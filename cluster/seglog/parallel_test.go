package seglog

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/payload"
)

// What recovery reads ahead on several goroutines is what it reads alone.
func TestParallelRecoveryFindsTheSame(t *testing.T) {
	t.Parallel()
	for seed := range uint64(6) {
		g := newRig(t, seed, minSegmentBytes, 40)
		g.open()
		keys := []ReplicaKey{{1, 1}, {2, 1}, {3, 4}}
		for _, k := range keys {
			g.create(k)
		}
		for i := range 40 {
			for j, k := range keys {
				m := g.reps[k].now()
				g.append(k, m.last()+1, 5+uint64(i/20), 1+(i+j)%4)
			}
			g.run(time.Millisecond)
			if i%10 == 9 {
				for _, k := range keys {
					g.apply(k)
				}
				g.checkpoint()
				g.truncate(keys[0], 3)
			}
		}
		g.crash(rand.New(rand.NewPCG(seed, 1)))
		alone := g.recovered(0)
		for _, workers := range []int{2, 8} {
			if got := g.recovered(workers); !slices.Equal(got, alone) {
				t.Fatalf("seed %d, %d workers: %v, alone %v", seed, workers, got, alone)
			}
		}
		g.open() // compares with the model, and reads every entry back
		g.verify()
	}
}

// An entry that recovery kept in memory is forgotten when its segment is used anew.
func TestKeptHeadersEndWithTheirSegment(t *testing.T) {
	t.Parallel()
	g := newRig(t, 3, minSegmentBytes, 12)
	g.open()
	k := ReplicaKey{1, 1}
	g.create(k)
	round := func() {
		s := g.reps[k].now()
		g.append(k, s.last()+1, 5, 8)
		g.run(2 * time.Millisecond)
		g.apply(k)
		g.checkpoint()
		g.truncate(k, 2)
		g.run(2 * time.Millisecond)
	}
	for range 6 {
		round()
	}
	s := g.reps[k].now()
	g.append(k, s.last()+1, 6, 12) // stays above what is applied
	g.run(2 * time.Millisecond)
	g.loop.Kill()
	g.open()
	if len(g.log.kept) == 0 {
		t.Fatal("nothing was kept")
	}
	for range 120 {
		round()
		g.readBack(g.reps[k], g.log.Replica(k))
	}
	if len(g.log.kept) != 0 {
		t.Fatalf("headers of %d segments are still kept", len(g.log.kept))
	}
	g.verify()
}

func TestEachAndInOrder(t *testing.T) {
	t.Parallel()
	for _, workers := range []int{0, 1, 3, 50} {
		var sum atomic.Int64
		if err := each(workers, 100, func(i int) error { sum.Add(int64(i)); return nil }); err != nil || sum.Load() != 4950 {
			t.Fatalf("%d workers: %v, %d", workers, err, sum.Load())
		}
		broken := errors.New("broken")
		if err := each(workers, 100, func(i int) error {
			if i == 7 {
				return broken
			}
			return nil
		}); err != broken {
			t.Fatalf("%d workers: %v", workers, err)
		}
		want := 0
		inOrder(workers, 100, func(i int) int { return i * i }, func(i, v int) {
			if i != want || workers > 1 && v != i*i {
				t.Errorf("%d workers: got %d, %d at %d", workers, i, v, want)
			}
			want++
		})
		if want != 100 {
			t.Fatalf("%d workers: %d of 100", workers, want)
		}
	}
}

// The window reads headers that lie apart alone, and those that lie close
// together with what is between them.
func TestWindowReadsWhatIsNeeded(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		gap   int64 // blocks from one header to the next
		calls int   // at most, for 512 headers
	}{{2, 40}, {300, 600}} {
		f := &countedFile{}
		w := &window{file: f, end: 1 << 30, buf: payload.New(maxWindow), size: 4 * block.Size}
		p := make([]byte, block.Size)
		for i := range int64(512) {
			if n, err := w.ReadAt(p, i*c.gap*block.Size); n != len(p) || err != nil || le.Uint64(p) != uint64(i*c.gap) {
				t.Fatalf("gap %d: %d, %v, block %d", c.gap, n, err, le.Uint64(p))
			}
		}
		if f.calls > c.calls || c.gap > 100 && f.bytes > 600*block.Size {
			t.Fatalf("gap %d: %d calls, %d bytes", c.gap, f.calls, f.bytes)
		}
	}
}

// countedFile has the number of each block at its beginning.
type countedFile struct{ calls, bytes int }

func (f *countedFile) ReadAt(p []byte, off int64) (int, error) {
	f.calls++
	f.bytes += len(p)
	for i := 0; i < len(p); i += block.Size {
		le.PutUint64(p[i:], uint64(off+int64(i))/block.Size)
	}
	return len(p), nil
}

// recovered opens a copy of the disk with so many goroutines and says what it found.
func (r *rig) recovered(workers int) (found []string) {
	r.t.Helper()
	o := r.options()
	o.Parallel = workers
	l, err := Open(r.fs.Crash(rand.New(rand.NewPCG(1, 1))), rigDir, r.sb, o)
	if err != nil {
		r.t.Fatalf("open: %v", err)
	}
	for _, rep := range l.order {
		found = append(found, fmt.Sprintf("%v %v %v..%d %v %q", rep.key, rep.trunc, rep.runs, rep.LastIndex(), rep.hard, rep.damage))
		for i := rep.FirstIndex(); i <= rep.LastIndex(); i++ {
			loc, n, ok := rep.Locate(i)
			found = append(found, fmt.Sprint(i, loc, n, ok))
		}
	}
	return found
}

// What is loaded ahead is bounded, and the one that is waited for is never
// without room.
func TestInOrderNeverWaitsForItself(t *testing.T) {
	t.Parallel()
	const workers, n = 8, 2000
	for range 200 {
		var ahead, used atomic.Int64
		at := 0
		inOrder(workers, n, func(i int) int {
			if a := ahead.Add(1) - used.Load(); a > workers*aheadSegments+1 {
				t.Errorf("%d are loaded ahead", a)
			}
			return i
		}, func(i, v int) {
			used.Add(1)
			if i != at || v != i {
				t.Fatalf("%d came as %d, expected %d", v, i, at)
			}
			at++
		})
		if at != n {
			t.Fatalf("%d of %d were used", at, n)
		}
	}
}

// A disk that fails by other work while survivors are being written lets go of
// their buffers once, and after the disk has.
func TestDiskFailsWhileSurvivorsAreWritten(t *testing.T) {
	t.Parallel()
	g := newRig(t, 1, minSegmentBytes, 12)
	g.open()
	stay, busy := ReplicaKey{1, 1}, ReplicaKey{9, 1}
	g.create(stay)
	g.create(busy)
	g.grown(stay, 5, 3)
	failed := false
	step := func() {
		for range 200 {
			g.run(10 * time.Microsecond)
			if w := &g.log.w; !failed && w.busy && w.round.move != nil {
				failed = true
				m, ended := w.round.move, 0
				done := m.done
				m.done = func(err error) {
					if ended++; ended > 1 || w.busy {
						t.Errorf("ended %d times, while the disk writes: %v", ended, w.busy)
					}
					done(err)
				}
				g.log.fail(errors.New("another file: input/output error"))
				g.run(time.Second)
				if ended != 1 {
					t.Errorf("the survivors were ended %d times", ended)
				}
			}
			if failed {
				return
			}
		}
	}
	for range 24 {
		g.grown(busy, 5, 10)
		step()
		if failed {
			return
		}
		g.saved(0, stay, busy)
		step()
		if failed {
			return
		}
	}
	t.Fatal("no survivors were written")
}
