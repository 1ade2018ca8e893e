// Package loop is the seam between single-threaded cores and the world. A core
// (a state machine of raftgroup, seglog, index, node, cluster or gateway) never
// starts a goroutine, waits or reads a clock: it is called on its Loop, and
// asks the Loop to run blocking work elsewhere and to call it back.
//
// Two kinds exist. System runs the functions on one goroutine and the work on
// bounded pools; Sim runs everything on the caller's goroutine in an order and
// at virtual times drawn from a seed, so that the production cores run
// unchanged in the simulator.
package loop

import (
	"math/rand/v2"
	"time"

	"firn.io/firn/internal/clock"
)

// Class says which pool blocking work runs on, so that slow work of one kind
// does not hold up another.
type Class uint8

const (
	// DiskWrite is log writes and syncs. Each caller keeps at most one in flight per disk.
	DiskWrite Class = iota
	// DiskRead is reads of segments and of the index for clients and peers.
	DiskRead
	// Merge is checkpoints, reaping and GC reads: long, in the background.
	Merge
	// Meta is calls to the metadata store.
	Meta
	// NumClasses is how many classes there are.
	NumClasses
)

// Loop runs functions one at a time, in the order they were posted.
//
// Everything but Post must be called on the loop. Functions must not block.
type Loop interface {
	// Now is the instant at which the running function began.
	Now() clock.Instant

	// Post queues fn. It may be called from any goroutine. After the loop has
	// stopped, fn is dropped.
	Post(fn func())

	// Defer runs fn once, at the end of the current turn: after the functions
	// that are already queued, before the loop waits. This is where a core
	// drains what it gathered in a turn (one MsgProp, one frame, one batch).
	Defer(fn func())

	// Do runs work off the loop and then posts done. work may block; it shares
	// no state with the loop but what it captures. done is called exactly once,
	// unless the loop stops first.
	Do(c Class, work func(), done func())

	// After posts fn once d has passed, unless the timer is stopped first.
	After(d time.Duration, fn func()) Timer

	// Rand is the loop's source of jitter. Never used by apply.
	Rand() *rand.Rand
}

// Timer is a pending After.
type Timer interface {
	// Stop prevents the call. It returns false if it was too late. When Stop is
	// called on the loop and returns true, fn will not run.
	Stop() bool
}
