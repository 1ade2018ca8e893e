package nbd

import (
	"io"
	"net"
	"sync"
	"time"
)

// input reads a connection. Requests are parsed in place in its buffer;
// payloads that are not in it yet go straight to where they belong.
type input struct {
	nc   net.Conn
	buf  []byte
	r, w int
	// idle, if set, is called before every read that may block.
	idle func() error
	// now and stall bound how long the middle of a message may take; 0 leaves
	// the connection's deadlines alone.
	now   func() time.Time
	stall time.Duration

	// mu orders deadlines against interrupt, which no later one undoes.
	mu          sync.Mutex
	interrupted bool
}

func newInput(nc net.Conn, size int) *input { return &input{nc: nc, buf: make([]byte, size)} }

// resize moves what is buffered, which must fit, to a buffer of another size.
func (in *input) resize(size int) {
	buf := make([]byte, max(size, in.w-in.r))
	in.w = copy(buf, in.buf[in.r:in.w])
	in.r, in.buf = 0, buf
}

func (in *input) buffered() int { return in.w - in.r }

// peek returns the next n bytes, which must fit the buffer, without consuming
// them. They are valid until the next call. io.EOF means that the peer closed
// before the first of them.
func (in *input) peek(n int) ([]byte, error) {
	if in.buffered() < n {
		if err := in.fill(n, in.buffered() > 0); err != nil {
			return nil, err
		}
	}
	return in.buf[in.r : in.r+n], nil
}

func (in *input) discard(n int) { in.r += n }

// fill makes n bytes available; within says that they belong to a message that
// has begun.
func (in *input) fill(n int, within bool) error {
	if in.r == in.w {
		in.r, in.w = 0, 0
	} else if in.r+n > len(in.buf) {
		in.w = copy(in.buf, in.buf[in.r:in.w])
		in.r = 0
	}
	for in.buffered() < n {
		got, err := in.read(in.buf[in.w:], within)
		in.w += got
		within = within || got > 0
		if err != nil && in.buffered() < n {
			if err == io.EOF && within {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
	}
	return nil
}

// full fills p with the next bytes of a message that has begun.
func (in *input) full(p []byte) error {
	n := copy(p, in.buf[in.r:in.w])
	in.r += n
	for n < len(p) {
		got, err := in.read(p[n:], true)
		n += got
		if err != nil && n < len(p) {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
	}
	return nil
}

// skip throws away the next n bytes of a message that has begun.
func (in *input) skip(n int) error {
	for n > 0 {
		if in.buffered() == 0 {
			if err := in.fill(1, true); err != nil {
				return err
			}
		}
		k := min(n, in.buffered())
		in.r, n = in.r+k, n-k
	}
	return nil
}

// read is the only place that reads the socket. within says that a message has
// begun: the rest of it must not stall.
func (in *input) read(p []byte, within bool) (int, error) {
	if in.idle != nil {
		if err := in.idle(); err != nil {
			return 0, err
		}
	}
	if !within || in.stall == 0 {
		return in.nc.Read(p)
	}
	in.deadline(in.now().Add(in.stall))
	n, err := in.nc.Read(p)
	in.deadline(time.Time{})
	return n, err
}

// deadline sets the read deadline. A socket on which that fails is closed, and
// reading it says so.
func (in *input) deadline(t time.Time) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if !in.interrupted {
		_ = in.nc.SetReadDeadline(t)
	}
}

// interrupt ends the current read and all later ones. Any goroutine may call it.
func (in *input) interrupt() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.interrupted = true
	_ = in.nc.SetReadDeadline(time.Unix(1, 0))
}

// wasInterrupted tells why reading failed.
func (in *input) wasInterrupted() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.interrupted
}
