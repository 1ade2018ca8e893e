package loop_test

import (
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	"firn.io/firn/internal/clock"
	"firn.io/firn/internal/loop"
)

func TestSystemRunsInOrderAndDefersToTheEndOfTheTurn(t *testing.T) {
	s := loop.NewSystem(clock.System{}, loop.DefaultLimits)
	defer s.Stop()
	var got []string
	finished := make(chan struct{})
	s.Call(func() {
		s.Defer(func() {
			got = append(got, "end of turn")
			s.Defer(func() { got = append(got, "deferred by a deferred"); close(finished) })
		})
		got = append(got, "first")
		s.Post(func() { got = append(got, "next turn") })
	})
	<-finished
	s.Call(func() {})
	want := "[first end of turn deferred by a deferred next turn]"
	if fmt.Sprint(got) != want {
		t.Fatalf("ran %v, want %v", got, want)
	}
}

func TestSystemBoundsWork(t *testing.T) {
	limits := loop.DefaultLimits
	limits[loop.Merge] = 3
	s := loop.NewSystem(clock.System{}, limits)
	defer s.Stop()
	const jobs = 50
	var running, most, ended atomic.Int32
	all := make(chan struct{})
	s.Call(func() {
		for range jobs {
			s.Do(loop.Merge, func() {
				n := running.Add(1)
				for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
				}
				running.Add(-1)
			}, func() {
				if ended.Add(1) == jobs {
					close(all)
				}
			})
		}
	})
	<-all
	if most.Load() > 3 {
		t.Fatalf("%d pieces of work at once, the limit is 3", most.Load())
	}
}

func TestSystemStopWaitsForWorkAndDropsTheRest(t *testing.T) {
	s := loop.NewSystem(clock.System{}, loop.DefaultLimits)
	started, release := make(chan struct{}), make(chan struct{})
	var worked atomic.Bool
	s.Post(func() {
		s.Do(loop.DiskRead, func() { close(started); <-release; worked.Store(true) }, func() { t.Error("done ran after Stop") })
	})
	<-started
	stopped := make(chan struct{})
	go func() { s.Stop(); close(stopped) }()
	for s.Call(func() {}) {
	}
	close(release)
	<-stopped
	if !worked.Load() {
		t.Fatal("Stop returned before the work had ended")
	}
	s.Post(func() { t.Error("ran after Stop") })
}

func TestTimerStoppedOnTheLoopNeverFires(t *testing.T) {
	s := loop.NewSystem(clock.System{}, loop.DefaultLimits)
	defer s.Stop()
	fired := make(chan struct{})
	s.Call(func() {
		stopped := s.After(0, func() { t.Error("a stopped timer fired") })
		if !stopped.Stop() {
			t.Error("Stop on the loop came too late")
		}
		s.After(time.Millisecond, func() { close(fired) })
	})
	<-fired
}

// trace runs a small world and writes down all that happens.
func trace(seed uint64) string {
	w := loop.NewWorld(seed)
	var out string
	for p := range 3 {
		l := w.NewLoop(nil)
		var tick func(n int)
		tick = func(n int) {
			out += fmt.Sprintf("%d:%d@%d ", p, n, w.Now())
			if n == 20 {
				return
			}
			l.Do(loop.Class(n%int(loop.NumClasses)), func() { out += "w " }, func() {
				l.After(time.Duration(l.Rand().IntN(1000)), func() { tick(n + 1) })
			})
		}
		l.Post(func() { tick(0) })
	}
	for w.Step() {
	}
	return out
}

func TestWorldReplaysFromItsSeed(t *testing.T) {
	if trace(7) != trace(7) {
		t.Fatal("one seed, two histories")
	}
	if trace(7) == trace(8) {
		t.Fatal("two seeds, one history: the seed is not used")
	}
}

func TestSimKillPauseAndClock(t *testing.T) {
	w := loop.NewWorld(1)
	l := w.NewLoop(func(loop.Class, *rand.Rand) time.Duration { return time.Millisecond })
	ran := 0
	l.Pause()
	l.Post(func() { ran++ })
	w.RunFor(time.Second)
	if ran != 0 {
		t.Fatal("a paused process ran")
	}
	l.Resume()
	w.RunFor(time.Second)
	if ran != 1 {
		t.Fatal("a resumed process did not go on")
	}

	before := l.Now()
	l.SetClock(2, 5*time.Second)
	w.RunFor(time.Second)
	if got := l.Now().Sub(before); got != 7*time.Second {
		t.Fatalf("a clock at rate 2 after a jump of 5 s moved %v in 1 s", got)
	}

	l.Do(loop.DiskWrite, func() {}, func() { t.Error("a killed process went on") })
	l.After(time.Second, func() { t.Error("a killed process's timer fired") })
	l.Kill()
	w.RunFor(time.Minute)
}

func TestRunUntil(t *testing.T) {
	w := loop.NewWorld(1)
	l := w.NewLoop(nil)
	hit := false
	l.After(3*time.Second, func() { hit = true })
	if w.RunUntil(time.Second, func() bool { return hit }) {
		t.Fatal("too early")
	}
	if !w.RunUntil(10*time.Second, func() bool { return hit }) || w.Now().Sub(0) > 5*time.Second {
		t.Fatal("did not stop at the event")
	}
}

func BenchmarkSystemPost(b *testing.B) {
	s := loop.NewSystem(clock.System{}, loop.DefaultLimits)
	defer s.Stop()
	b.ReportAllocs()
	fn := func() {}
	for range b.N {
		s.Post(fn)
	}
	s.Call(fn)
}

// Work that hangs on one lane holds up neither the other nor the loop.
func TestLanesDoNotWaitForOneAnother(t *testing.T) {
	limits := loop.Limits{loop.DiskRead: 1, loop.Merge: 1}
	s := loop.NewSystem(clock.System{}, limits)
	defer s.Stop()
	stuck, well := s.Lane(limits), s.Lane(limits)
	hang, hung, done := make(chan struct{}), make(chan struct{}), make(chan struct{})
	defer close(hang)
	s.Call(func() {
		stuck.Do(loop.DiskRead, func() { close(hung); <-hang }, func() {})
		stuck.Do(loop.DiskRead, func() {}, func() { t.Error("a second piece of work ran beside the one that hangs") })
	})
	<-hung
	s.Call(func() {
		well.Do(loop.DiskRead, func() {}, func() {
			s.Do(loop.DiskRead, func() {}, func() { close(done) })
		})
	})
	<-done
}
