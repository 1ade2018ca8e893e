package nbd

import (
	"slices"
	"sync"
)

// budget bounds the payload bytes of all connections: each may hold
// reserveBytes whatever the others do, so that connections to a volume that
// hangs cannot starve those to another, and what they hold above that is at
// most total in all.
type budget struct {
	mu sync.Mutex
	// free is what is left of the total.
	free  int64
	inUse int64
	// waiting is in the order of arrival.
	waiting []*waiter
}

// allowance is what one connection holds, at most limit.
type allowance struct {
	b     *budget
	limit int64
	held  int64
}

// waiter is the one goroutine of a connection that takes, waiting.
type waiter struct {
	a     *allowance
	n     int64
	ready chan struct{}
}

func newBudget(total int64) *budget { return &budget{free: total} }

func newAllowance(b *budget, limit int64) *allowance { return &allowance{b: b, limit: limit} }

// shared is how much of held bytes counts against the total.
func shared(held int64) int64 { return max(0, held-reserveBytes) }

// need is what taking n would take of the total; the budget is locked.
func (a *allowance) need(n int64) int64 { return shared(a.held+n) - shared(a.held) }

func (a *allowance) grant(n int64) {
	a.b.free -= a.need(n)
	a.held += n
	a.b.inUse += n
}

// try takes n bytes if they are free now and nobody waited for them longer.
func (a *allowance) try(n int64) (charge, bool) {
	b := a.b
	b.mu.Lock()
	defer b.mu.Unlock()
	need := a.need(n)
	if a.held+n > a.limit || need > 0 && (need > b.free || len(b.waiting) > 0) {
		return charge{}, false
	}
	a.grant(n)
	return charge{a, n}, true
}

// begin takes n <= limit bytes, or queues for them: then w.ready is closed when
// they are there. Only the goroutine that reads the connection calls it, and it
// holds nothing that another needs to go on.
func (a *allowance) begin(n int64) (*waiter, charge) {
	if c, ok := a.try(n); ok {
		return nil, c
	}
	b := a.b
	w := &waiter{a, n, make(chan struct{})}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.waiting = append(b.waiting, w)
	b.wake()
	return w, charge{}
}

// giveUp ends a wait with err, unless the bytes were granted at the same moment.
func (a *allowance) giveUp(w *waiter, err error) (charge, error) {
	b := a.b
	b.mu.Lock()
	defer b.mu.Unlock()
	i := slices.Index(b.waiting, w)
	if i < 0 {
		return charge{a, w.n}, nil
	}
	b.waiting = slices.Delete(b.waiting, i, i+1)
	b.wake()
	return charge{}, err
}

// wake grants what can be granted; the budget is locked. Who lacks a part of
// the total holds up those behind him who need of it too, and nobody else.
func (b *budget) wake() {
	short := false
	b.waiting = slices.DeleteFunc(b.waiting, func(w *waiter) bool {
		if w.a.held+w.n > w.a.limit {
			return false
		}
		if need := w.a.need(w.n); need > 0 && (short || need > b.free) {
			short = true
			return false
		}
		w.a.grant(w.n)
		close(w.ready)
		return true
	})
}

func (b *budget) used() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.inUse
}

// charge is bytes taken from an allowance. The zero charge is none.
type charge struct {
	from  *allowance
	bytes int64
}

func (c charge) release() {
	if c.from == nil {
		return
	}
	b := c.from.b
	b.mu.Lock()
	defer b.mu.Unlock()
	b.free += shared(c.from.held) - shared(c.from.held-c.bytes)
	c.from.held -= c.bytes
	b.inUse -= c.bytes
	if len(b.waiting) > 0 {
		b.wake()
	}
}

// split hands n bytes of a charge to a buffer of their own.
func (c *charge) split(n int64) charge {
	c.bytes -= n
	return charge{c.from, n}
}
