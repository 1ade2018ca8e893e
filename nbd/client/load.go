package client

import (
	"math/rand/v2"
	"time"

	"firn.io/firn/nbd/wire"
)

// Load keeps a number of requests of one kind in flight.
type Load struct {
	// Depth is how many requests are in flight.
	Depth int
	// Bytes is the length of each; offsets are multiples of it.
	Bytes int
	// Span is the part of the export that is used, from its start.
	Span int64
	// Write writes, otherwise reads.
	Write bool
	// Sequential goes through Span in order, otherwise offsets are random.
	Sequential bool
	// Seed of the random offsets.
	Seed uint64
	// Observe, if set, is told how long each request took, as Now measures it.
	// It is called by one goroutine.
	Observe func(time.Duration)
	Now     func() time.Time
}

// load is the state of a running Load; all but the first calls are made by the
// goroutine that reads the connection.
type load struct {
	Load
	c        *Conn
	rnd      *rand.Rand
	next     int64
	left     int
	inFlight int
	err      error
	done     chan error
	over     bool
}

// Run sends n requests over c and returns when all are answered.
func (l Load) Run(c *Conn, n int) error {
	r := &load{Load: l, c: c, rnd: rand.New(rand.NewPCG(l.Seed, 5)), left: n, done: make(chan error, 1)}
	// The first call is made here; its answer starts the others where all later
	// ones are made too.
	err := c.Submit(&Call{Command: wire.CmdFlush, Done: func(_ *Call, err error) {
		if err != nil {
			r.done <- err
			return
		}
		for range min(l.Depth, n) {
			r.submit(r.newCall())
		}
		r.check()
	}})
	if err != nil {
		return err
	}
	if err := c.Flush(); err != nil {
		return err
	}
	return <-r.done
}

func (r *load) newCall() *Call {
	call := &Call{Command: wire.CmdRead, Data: make([]byte, r.Bytes)}
	if r.Write {
		call.Command = wire.CmdWrite
		for i := range call.Data {
			call.Data[i] = byte(r.rnd.Uint32())
		}
	}
	var start time.Time
	if r.Observe != nil {
		start = r.Now()
	}
	call.Done = func(call *Call, err error) {
		r.inFlight--
		if r.Observe != nil {
			now := r.Now()
			r.Observe(now.Sub(start))
			start = now
		}
		if err != nil && r.err == nil {
			r.err = err
		}
		if r.left > 0 && r.err == nil {
			r.submit(call)
		}
		r.check()
	}
	return call
}

func (r *load) submit(call *Call) {
	r.left--
	blocks := r.Span / int64(r.Bytes)
	if r.Sequential {
		call.Off = uint64(r.next % blocks * int64(r.Bytes))
		r.next++
	} else {
		call.Off = uint64(r.rnd.Int64N(blocks) * int64(r.Bytes))
	}
	if err := r.c.Submit(call); err != nil {
		r.err = err
		return
	}
	r.inFlight++
}

func (r *load) check() {
	if r.inFlight == 0 && (r.left <= 0 || r.err != nil) && !r.over {
		r.over = true
		r.done <- r.err
	}
}
