package iscsi

import (
	"encoding/binary"
	"net"
	"sync"
	"time"

	"firn.io/firn/internal/block"
	"firn.io/firn/iscsi/pdu"
)

const (
	// copyBelow is the size of data that is copied behind its header instead of
	// being written from where it is.
	copyBelow = 16 << 10
	// batchBytes is how much may wait before the reader of the connection waits.
	batchBytes = 512 << 10
	// writeBytes bounds one system call, so that a deadline is a deadline.
	writeBytes = 1 << 20
)

// sender is the combining writer of a connection: it gives responses their
// StatSN and windows in the order in which they leave. Whoever finds it idle
// writes until nothing is left; the others only append.
type sender struct {
	nc     net.Conn
	now    func() time.Time
	stall  time.Duration
	p      *params
	window func() (expCmdSN, maxCmdSN uint32)

	// scratch is a header for the reader's goroutine.
	scratch pdu.Header

	mu      sync.Mutex
	drained sync.Cond
	statSN  uint32
	cur     *outBatch
	spare   *outBatch
	writing bool
	err     error
}

// outBatch is what leaves together.
type outBatch struct {
	buf   []byte // copied bytes; segs share it
	from  int
	segs  net.Buffers
	space net.Buffers
	done  []func()
	n     int
}

func (b *outBatch) seal() {
	if len(b.buf) > b.from {
		b.segs = append(b.segs, b.buf[b.from:])
		b.from = len(b.buf)
	}
}

func (b *outBatch) reset() {
	clear(b.segs)
	clear(b.done)
	b.buf, b.from, b.segs, b.done, b.n = b.buf[:0], 0, b.segs[:0], b.done[:0], 0
}

func newSender(nc net.Conn, opt *Options) *sender {
	o := &sender{nc: nc, now: opt.Now, stall: opt.StallTimeout, p: &params{}, cur: &outBatch{}, spare: &outBatch{}}
	o.drained.L = &o.mu
	o.window = func() (uint32, uint32) { return 0, 0 }
	return o
}

// padding fills data segments up.
var padding [3]byte

// flags of a message.
type outFlags uint8

const (
	// takesStatSN messages get a StatSN of their own.
	takesStatSN outFlags = 1 << iota
	// hasStatSN messages show the next StatSN without taking it.
	hasStatSN
	// later leaves it to the next one to write.
	later
)

// send appends a PDU. data is written before done, if not nil, is called, and
// not kept after it; small data is copied, and done called at once.
func (o *sender) send(h *pdu.Header, data []byte, f outFlags, done func()) {
	o.mu.Lock()
	o.add(h, data, f, done)
	o.release(f)
}

// add is called with mu held.
func (o *sender) add(h *pdu.Header, data []byte, f outFlags, done func()) {
	if o.err != nil {
		if done != nil {
			done()
		}
		return
	}
	if f&(takesStatSN|hasStatSN) != 0 {
		h.SetWord(pdu.AtStatSN, o.statSN)
		if f&takesStatSN != 0 {
			o.statSN++
		}
	}
	exp, max := o.window()
	h.SetWord(pdu.AtExpCmdSN, exp)
	h.SetWord(pdu.AtMaxCmdSN, max)
	h.SetDataLen(len(data))
	b := o.cur
	at := len(b.buf)
	b.buf = append(b.buf, h[:]...)
	if o.p.headerDigest {
		b.buf = binary.LittleEndian.AppendUint32(b.buf, block.CRC(h[:]))
	}
	b.n += len(data)
	if len(data) < copyBelow {
		b.buf = append(b.buf, data...)
	} else {
		b.seal()
		b.segs = append(b.segs, data)
	}
	if len(data) > 0 {
		pad := padding[:pdu.Padded(len(data))-len(data)]
		b.buf = append(b.buf, pad...)
		if o.p.dataDigest {
			b.buf = binary.LittleEndian.AppendUint32(b.buf, block.UpdateCRC(block.CRC(data), pad))
		}
	}
	b.n += len(b.buf) - at
	if done != nil {
		if len(data) < copyBelow {
			done()
		} else {
			b.done = append(b.done, done)
		}
	}
}

// release ends what began with mu.Lock and writes, unless another does or f says
// later.
func (o *sender) release(f outFlags) {
	if o.writing || f&later != 0 && o.cur.n < batchBytes {
		o.mu.Unlock()
		return
	}
	o.writing = true
	for o.cur.n > 0 {
		b := o.cur
		o.cur, o.spare = o.spare, nil
		o.mu.Unlock()
		b.seal()
		err := o.write(b)
		for _, f := range b.done {
			f()
		}
		b.reset()
		o.mu.Lock()
		o.spare = b
		if err != nil && o.err == nil {
			o.err = err
			o.nc.Close() // the reader notices
		}
		if o.err != nil {
			for _, f := range o.cur.done {
				f()
			}
			o.cur.reset()
		}
		o.drained.Broadcast()
	}
	o.writing = false
	o.mu.Unlock()
}

func (o *sender) write(b *outBatch) error {
	for rest := b.segs; len(rest) > 0; {
		n, k := 0, 0
		for k < len(rest) && (k == 0 || n+len(rest[k]) <= writeBytes) {
			n += len(rest[k])
			k++
		}
		if err := o.nc.SetWriteDeadline(o.now().Add(o.stall)); err != nil {
			return err
		}
		if k == 1 {
			if _, err := o.nc.Write(rest[0]); err != nil {
				return err
			}
		} else {
			b.space = append(b.space[:0], rest[:k]...)
			v := b.space
			if _, err := v.WriteTo(o.nc); err != nil {
				return err
			}
		}
		rest = rest[k:]
	}
	return nil
}

// flush writes what waits; the reader calls it before it waits for input, and is
// held up while others write more than a batch.
func (o *sender) flush() error {
	o.mu.Lock()
	if o.cur.n == 0 && !o.writing {
		err := o.err
		o.mu.Unlock()
		return err
	}
	o.release(0)
	o.mu.Lock()
	defer o.mu.Unlock()
	for o.writing && o.cur.n > batchBytes && o.err == nil {
		o.drained.Wait()
	}
	return o.err
}
