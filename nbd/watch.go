package nbd

import (
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// watchTicks is how often a watch looks within its patience.
const watchTicks = 4

// watch finds out that a client has gone while the goroutine that reads its
// connection waits for something else, and so would not see the end. What was
// sent before the end may hold up that end in the socket, so it is not read but
// asked of the kernel.
//
// A client may send NBD_CMD_DISC behind requests and go at once, and those are
// to be carried out: only when a wait has lasted for all of patience with the
// client gone is it left. Thus a volume that hangs does not keep connections of
// clients that are no more, nor its attachment (F6).
type watch struct {
	nc       net.Conn
	patience time.Duration
	timer    *time.Timer
	ticks    int // since the client was first seen gone
}

// reset begins a wait.
func (w *watch) reset() {
	w.ticks = 0
	if w.timer == nil {
		w.timer = time.NewTimer(w.patience / watchTicks)
		return
	}
	w.timer.Reset(w.patience / watchTicks)
}

// stop ends it.
func (w *watch) stop() { w.timer.Stop() }

// tick is when left is to be called.
func (w *watch) tick() <-chan time.Time { return w.timer.C }

// left tells whether the client is gone for good.
func (w *watch) left() bool {
	w.timer.Reset(w.patience / watchTicks)
	if !gone(w.nc) {
		w.ticks = 0
		return false
	}
	w.ticks++
	return w.ticks >= watchTicks
}

// gone tells whether the peer has closed its end, whatever it sent before. Of a
// connection that is not a socket it cannot be told.
func gone(nc net.Conn) bool {
	sc, ok := clearConn(nc).(syscall.Conn)
	if !ok {
		return false
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return true
	}
	closed := false
	err = rc.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		n, err := unix.Poll(p, 0)
		closed = err == nil && n > 0 && p[0].Revents&(unix.POLLRDHUP|unix.POLLHUP|unix.POLLERR) != 0
	})
	return closed || err != nil
}
