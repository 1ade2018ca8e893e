package loop

import (
	"container/heap"
	"math"
	"math/rand/v2"
	"time"

	"firn.io/firn/internal/clock"
)

// World runs the loops of a simulation on the caller's goroutine, in virtual
// time. Everything that happens is drawn from one seed: the same seed and the
// same calls give the same order of events.
type World struct {
	now    clock.Instant
	seq    uint64
	events eventHeap
	rand   *rand.Rand
}

// NewWorld returns a world at instant 1 s.
func NewWorld(seed uint64) *World {
	return &World{now: clock.Instant(time.Second), rand: rand.New(rand.NewPCG(seed, 0x6669726e))}
}

// Now returns the world's true virtual time.
func (w *World) Now() clock.Instant { return w.now }

// Rand is the world's source of chance.
func (w *World) Rand() *rand.Rand { return w.rand }

// At runs fn at instant t, or now if t has passed.
func (w *World) At(t clock.Instant, fn func()) { w.at(t, fn) }

func (w *World) at(t clock.Instant, fn func()) *event {
	w.seq++
	e := &event{at: max(t, w.now), seq: w.seq, fn: fn}
	heap.Push(&w.events, e)
	return e
}

// Step runs the next event. It returns false when there is none.
func (w *World) Step() bool {
	for len(w.events) > 0 {
		e := heap.Pop(&w.events).(*event)
		if e.fn == nil {
			continue
		}
		w.now = e.at
		fn := e.fn
		e.fn = nil
		fn()
		return true
	}
	return false
}

// Run runs events until no event is left before t, then sets the time to t.
func (w *World) Run(t clock.Instant) {
	for len(w.events) > 0 && w.events[0].at <= t {
		w.Step()
	}
	w.now = max(w.now, t)
}

// RunFor runs the next d of virtual time.
func (w *World) RunFor(d time.Duration) { w.Run(w.now.Add(d)) }

// RunUntil runs events until cond holds or limit has passed; it returns cond().
func (w *World) RunUntil(limit time.Duration, cond func() bool) bool {
	end := w.now.Add(limit)
	for !cond() {
		if len(w.events) == 0 || w.events[0].at > end {
			w.now = max(w.now, end)
			return cond()
		}
		w.Step()
	}
	return true
}

type event struct {
	at  clock.Instant
	seq uint64
	fn  func() // nil once run or stopped
}

type eventHeap []*event

func (h eventHeap) Len() int { return len(h) }
func (h eventHeap) Less(i, j int) bool {
	return h[i].at < h[j].at || h[i].at == h[j].at && h[i].seq < h[j].seq
}
func (h eventHeap) Swap(i, j int) { h[i], h[j] = h[j], h[i] }
func (h *eventHeap) Push(x any)   { *h = append(*h, x.(*event)) }
func (h *eventHeap) Pop() any {
	old := *h
	e := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	return e
}

// Latency draws how long one piece of work of class c takes.
type Latency func(c Class, r *rand.Rand) time.Duration

// DefaultLatency is that of a fast disk and a near metadata store.
func DefaultLatency(c Class, r *rand.Rand) time.Duration {
	us := [NumClasses]int64{DiskWrite: 150, DiskRead: 80, Merge: 400, Meta: 800}[c]
	return time.Duration(us/2+r.Int64N(us)) * time.Microsecond
}

// Sim is the Loop of one simulated process.
type Sim struct {
	world   *World
	latency Latency
	dead    bool

	// rate is how fast this process's clock runs against the world's. A paused
	// process holds its events.
	rate     float64
	base     clock.Instant // world time at the last change of rate
	baseOwn  clock.Instant // own time then
	paused   bool
	held     []func()
	deferred []func()
	draining bool
}

// NewLoop returns the loop of a new simulated process. nil latency is DefaultLatency.
func (w *World) NewLoop(latency Latency) *Sim {
	if latency == nil {
		latency = DefaultLatency
	}
	return &Sim{world: w, latency: latency, rate: 1, base: w.now, baseOwn: w.now}
}

// Now implements Loop: the process's own clock.
func (s *Sim) Now() clock.Instant {
	return s.baseOwn + clock.Instant(float64(s.world.now-s.base)*s.rate)
}

// Wall implements clock.Clock.
func (s *Sim) Wall() time.Time { return time.Unix(0, int64(s.world.now)).UTC() }

// Rand implements Loop.
func (s *Sim) Rand() *rand.Rand { return s.world.rand }

// Post implements Loop.
func (s *Sim) Post(fn func()) { s.post(s.world.now, fn) }

func (s *Sim) post(t clock.Instant, fn func()) *event {
	return s.world.at(t, func() { s.enter(fn) })
}

// enter runs fn on the process, or holds it while the process is paused.
func (s *Sim) enter(fn func()) {
	switch {
	case s.dead:
	case s.paused:
		s.held = append(s.held, fn)
	default:
		fn()
		s.endTurn()
	}
}

func (s *Sim) endTurn() {
	if s.draining {
		return
	}
	s.draining = true
	for i := 0; i < len(s.deferred) && !s.dead; i++ {
		s.deferred[i]()
	}
	s.deferred = s.deferred[:0]
	s.draining = false
}

// Defer implements Loop.
func (s *Sim) Defer(fn func()) { s.deferred = append(s.deferred, fn) }

// Do implements Loop. The work runs at one instant, somewhere in the drawn
// latency: a crash before it leaves no trace of it, a crash after it leaves
// its effect without its answer.
func (s *Sim) Do(c Class, work func(), done func()) {
	d := s.latency(c, s.world.rand)
	at := s.world.now.Add(time.Duration(s.world.rand.Int64N(int64(d) + 1)))
	end := s.world.now.Add(d)
	s.world.at(at, func() {
		if s.dead {
			return
		}
		work()
		s.post(end, done)
	})
}

type simTimer struct{ e *event }

// Stop implements Timer.
func (t simTimer) Stop() bool {
	was := t.e.fn != nil
	t.e.fn = nil
	return was
}

// After implements Loop, on the process's own clock.
func (s *Sim) After(d time.Duration, fn func()) Timer {
	// Rounded up: by then the own clock has reached what the timer is for.
	real := time.Duration(math.Ceil(float64(d) / s.rate))
	return simTimer{s.post(s.world.now.Add(real), fn)}
}

// Kill ends the process at once: nothing of it runs any more.
func (s *Sim) Kill() {
	s.dead = true
	s.held, s.deferred = nil, nil
}

// Dead tells whether the process was killed.
func (s *Sim) Dead() bool { return s.dead }

// Pause stops the process as SIGSTOP does; Resume lets it go on.
func (s *Sim) Pause() { s.paused = true }

// Resume ends a pause; what was held happens now, in its order.
func (s *Sim) Resume() {
	s.paused = false
	held := s.held
	s.held = nil
	for _, fn := range held {
		s.Post(fn)
	}
}

// SetClock changes the process's clock: its rate from now on, and a jump.
func (s *Sim) SetClock(rate float64, jump time.Duration) {
	own := s.Now()
	s.base, s.baseOwn, s.rate = s.world.now, own.Add(jump), rate
}
