package meta

import (
	"context"
	"time"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/clock"
	"firn.io/firn/internal/loop"
)

// Times of leases (F3).
const (
	// OwnerTTL is the time to live of the leases of gateways and of the owner
	// keys on them.
	OwnerTTL = 3 * time.Second
	// NodeTTL is that of nodes' liveness and of the coordinator.
	NodeTTL = 5 * time.Second
	// LeaseMargin is how much earlier than the store a holder counts its lease
	// as ended; clock rates may differ by 5 % of OwnerTTL within it.
	LeaseMargin = 500 * time.Millisecond
)

// Session keeps one lease alive, from a core on its loop. The lease counts from
// when a keep-alive was sent, not from its answer, on the loop's clock, which
// goes on while the machine sleeps (F3).
//
// A session that loses its lease (the store let it end, or lost it) gets a new
// one by itself and calls Granted again: whatever hung on the old lease is gone
// and is to be written again. While the store is away, the session tries on.
//
// All methods are called on the loop.
type Session struct {
	loop    loop.Loop
	store   Store
	ttl     time.Duration
	granted func(LeaseID)
	lost    func()

	ctx     context.Context // ends the session's calls; from Start
	lease   LeaseID
	sent    clock.Instant // of the newest keep-alive, or grant, that was answered
	running bool
	busy    bool // a call is in flight
	failing bool // the last call was not answered
	problem error
	timer   loop.Timer
}

// NewSession makes a session; Start begins it. granted is called with each new
// lease; lost, if not nil, when a lease has ended before the session was stopped.
func NewSession(l loop.Loop, s Store, ttl time.Duration, granted func(LeaseID), lost func()) *Session {
	return &Session{loop: l, store: s, ttl: ttl, granted: granted, lost: lost}
}

// Start asks for a lease. ctx bounds the session's calls; it ends by Stop.
func (s *Session) Start(ctx context.Context) {
	s.ctx, s.running = ctx, true
	s.step()
}

// Lease is the lease now held, as far as known; 0 for none.
func (s *Session) Lease() LeaseID { return s.lease }

// ValidUntil is when the holder must count the lease as ended: 0 without one.
func (s *Session) ValidUntil() clock.Instant {
	if s.lease == 0 {
		return 0
	}
	return s.sent.Add(s.ttl - LeaseMargin)
}

// Valid tells whether the lease surely still stands.
func (s *Session) Valid() bool { return s.loop.Now() < s.ValidUntil() }

// Failing tells whether the store did not answer the session's last call: what
// is asked of it now will most likely have to wait.
func (s *Session) Failing() bool { return s.failing }

// Problem is the error of the last call that was not answered, while Failing.
func (s *Session) Problem() error { return s.problem }

// Stop ends the session and revokes its lease; done is called when the store
// has answered, or after an error, with which the lease ends by itself. A store
// that does not answer anyway is not waited for.
func (s *Session) Stop(done func(error)) {
	s.running = false
	if s.timer != nil {
		s.timer.Stop()
	}
	lease := s.lease
	s.lease = 0
	if lease != 0 && !s.failing {
		s.revoke(lease, done)
		return
	}
	if lease != 0 {
		s.revoke(lease, func(error) {})
	}
	s.loop.Post(func() { done(nil) })
}

func (s *Session) revoke(lease LeaseID, done func(error)) {
	var err error
	s.loop.Do(loop.Meta, func() { err = s.store.Revoke(s.ctx, lease) }, func() { done(err) })
}

func (s *Session) step() {
	if !s.running || s.busy {
		return
	}
	s.busy = true
	if s.lease == 0 {
		s.grant()
		return
	}
	s.keepAlive()
}

func (s *Session) grant() {
	sent := s.loop.Now()
	var id LeaseID
	var err error
	s.loop.Do(loop.Meta, func() { id, err = s.store.Grant(s.ctx, s.ttl) }, func() {
		s.busy, s.failing, s.problem = false, err != nil, err
		switch {
		case err != nil:
			s.later(s.ttl / 6)
		case !s.running:
			s.revoke(id, func(error) {})
		default:
			s.lease, s.sent = id, sent
			s.later(s.ttl / 3)
			s.granted(id)
		}
	})
}

func (s *Session) keepAlive() {
	sent, id := s.loop.Now(), s.lease
	var err error
	s.loop.Do(loop.Meta, func() { err = s.store.KeepAlive(s.ctx, id) }, func() {
		s.busy, s.failing, s.problem = false, err != nil && block.KindOf(err) != block.NotFound, err
		switch {
		case !s.running:
		case err == nil:
			s.sent = sent
			s.later(s.ttl / 3)
		case block.KindOf(err) == block.NotFound:
			s.lease = 0
			if s.lost != nil {
				s.lost()
			}
			s.step()
		default:
			s.later(s.ttl / 12)
		}
	})
}

func (s *Session) later(d time.Duration) {
	if s.running {
		s.timer = s.loop.After(d, s.step)
	}
}
