package loop

import (
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"firn.io/firn/internal/clock"
)

// Limits are how many pieces of blocking work of each class run at once.
type Limits [NumClasses]int

// DefaultLimits suit one node or gateway, and each disk of a node.
var DefaultLimits = Limits{DiskWrite: 16, DiskRead: 32, Merge: 2, Meta: 8}

// System is the Loop of a running process. Its queue is bounded by what the
// loop's users have in flight: every producer (a frame reader, a timer, an
// operation) has its own limit.
type System struct {
	clock clock.Clock
	rand  *rand.Rand

	mu      sync.Mutex
	wake    *sync.Cond
	queue   []func()
	stopped bool
	pools   pools
	lanes   []*Lane

	// Used on the loop only.
	now      clock.Instant
	deferred []func()

	workers sync.WaitGroup
	done    chan struct{} // closed when the loop's goroutine has ended
}

// pools run blocking work, under the mutex of their System.
type pools [NumClasses]pool

func (p *pools) limit(l Limits) {
	for i := range p {
		p[i].limit = max(1, l[i])
	}
}

func (p *pools) drop() {
	for i := range p {
		p[i].waiting = nil
	}
}

type pool struct {
	running, limit int
	waiting        []job
}

type job struct{ work, done func() }

// NewSystem starts a loop. The caller stops it.
func NewSystem(c clock.Clock, limits Limits) *System {
	s := &System{clock: c, rand: rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64())), done: make(chan struct{})}
	s.wake = sync.NewCond(&s.mu)
	s.pools.limit(limits)
	go s.run()
	return s
}

func (s *System) run() {
	defer close(s.done)
	var batch []func()
	for {
		s.mu.Lock()
		for len(s.queue) == 0 && !s.stopped {
			s.wake.Wait()
		}
		if s.stopped {
			s.mu.Unlock()
			return
		}
		batch, s.queue = s.queue, batch[:0]
		s.mu.Unlock()

		s.now = s.clock.Now()
		for i, fn := range batch {
			fn()
			batch[i] = nil
		}
		for i := 0; i < len(s.deferred); i++ {
			s.deferred[i]()
			s.deferred[i] = nil
		}
		s.deferred = s.deferred[:0]
	}
}

// Now implements Loop.
func (s *System) Now() clock.Instant { return s.now }

// Rand implements Loop.
func (s *System) Rand() *rand.Rand { return s.rand }

// Post implements Loop.
func (s *System) Post(fn func()) {
	s.mu.Lock()
	if !s.stopped {
		s.queue = append(s.queue, fn)
		if len(s.queue) == 1 {
			s.wake.Signal()
		}
	}
	s.mu.Unlock()
}

// Defer implements Loop.
func (s *System) Defer(fn func()) { s.deferred = append(s.deferred, fn) }

// Do implements Loop.
func (s *System) Do(c Class, work func(), done func()) { s.do(&s.pools[c], work, done) }

// Lane is a System with pools of its own: work that hangs on it, as on a disk
// that does not answer, holds up no work of others.
type Lane struct {
	*System
	pools pools
}

// Lane makes one. It ends with the System.
func (s *System) Lane(limits Limits) *Lane {
	l := &Lane{System: s}
	l.pools.limit(limits)
	s.mu.Lock()
	s.lanes = append(s.lanes, l)
	s.mu.Unlock()
	return l
}

// Do implements Loop.
func (l *Lane) Do(c Class, work func(), done func()) { l.do(&l.pools[c], work, done) }

func (s *System) do(p *pool, work func(), done func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped {
		return
	}
	if p.running == p.limit {
		p.waiting = append(p.waiting, job{work, done})
		return
	}
	p.running++
	s.workers.Add(1)
	go s.work(p, job{work, done})
}

func (s *System) work(p *pool, j job) {
	defer s.workers.Done()
	for {
		j.work()
		s.Post(j.done)
		s.mu.Lock()
		if len(p.waiting) == 0 || s.stopped {
			p.running--
			s.mu.Unlock()
			return
		}
		j = p.waiting[0]
		p.waiting[0] = job{}
		p.waiting = p.waiting[1:]
		s.mu.Unlock()
	}
}

type systemTimer struct {
	t    *time.Timer
	dead atomic.Bool
}

// Stop implements Timer.
func (t *systemTimer) Stop() bool {
	t.t.Stop()
	return t.dead.CompareAndSwap(false, true)
}

// After implements Loop.
func (s *System) After(d time.Duration, fn func()) Timer {
	t := &systemTimer{}
	t.t = time.AfterFunc(d, func() {
		s.Post(func() {
			if t.dead.CompareAndSwap(false, true) {
				fn()
			}
		})
	})
	return t
}

// Stop ends the loop after the function that is running, drops what is queued,
// and returns when the loop and all work it started have ended. It must not be
// called on the loop.
func (s *System) Stop() {
	s.mu.Lock()
	s.stopped = true
	s.queue = nil
	s.pools.drop()
	for _, l := range s.lanes {
		l.pools.drop()
	}
	s.wake.Signal()
	s.mu.Unlock()
	<-s.done
	s.workers.Wait()
}

// Call runs fn on the loop and waits for it. It must not be called on the loop.
// It returns false if the loop stopped first.
func (s *System) Call(fn func()) bool {
	ran := make(chan struct{})
	s.Post(func() { fn(); close(ran) })
	select {
	case <-ran:
		return true
	case <-s.done:
		select {
		case <-ran:
			return true
		default:
			return false
		}
	}
}
