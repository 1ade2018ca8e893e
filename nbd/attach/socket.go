package attach

import (
	"errors"
	"net"
	"os"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	// keepIdle, keepEvery in seconds and keepTries say when a silent connection
	// is dead, userTimeout in milliseconds when one is on which data is not
	// acknowledged. A server that is slow, but there, acknowledges.
	keepIdle    = 5
	keepEvery   = 3
	keepTries   = 3
	userTimeout = 15000
)

// socketOf returns a descriptor of nc's socket that Go's poller does not watch:
// it would wake at each reply of the server.
func socketOf(nc net.Conn) (int, error) {
	sc, ok := nc.(syscall.Conn)
	if !ok {
		return -1, errors.New("the connection is not a socket")
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return -1, err
	}
	if err := patience(nc); err != nil {
		return -1, err
	}
	fd := -1
	controlErr := rc.Control(func(s uintptr) { fd, err = unix.FcntlInt(s, unix.F_DUPFD_CLOEXEC, 3) })
	return fd, errors.Join(controlErr, err)
}

// patience sets when a connection of TCP is dead.
func patience(nc net.Conn) error {
	tcp, ok := nc.(*net.TCPConn)
	if !ok {
		return nil
	}
	rc, err := tcp.SyscallConn()
	if err != nil {
		return err
	}
	controlErr := rc.Control(func(s uintptr) { err = setPatience(int(s)) })
	return errors.Join(controlErr, err)
}

func setPatience(fd int) error {
	for _, o := range []struct{ level, name, value int }{
		{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1}, {unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
		{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, keepIdle}, {unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, keepEvery},
		{unix.IPPROTO_TCP, unix.TCP_KEEPCNT, keepTries}, {unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, userTimeout},
	} {
		if err := unix.SetsockoptInt(fd, o.level, o.name, o.value); err != nil {
			return os.NewSyscallError("setsockopt", err)
		}
	}
	return nil
}

const hangup = unix.POLLRDHUP | unix.POLLHUP | unix.POLLERR | unix.POLLNVAL

// gone tells whether the connection is over. An unknown socket (-1) is not.
func gone(fd int) bool {
	if fd < 0 {
		return false
	}
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
	n, err := unix.Poll(p, 0)
	return err == nil && n > 0 && p[0].Revents&hangup != 0
}

// shutdown ends the connection for the kernel too, which has its own hold on it.
func shutdown(fd int) { unix.Shutdown(fd, unix.SHUT_RDWR) }

func shut(fd int) {
	shutdown(fd)
	unix.Close(fd)
}

// release ends a dead slot's connection here.
func (s *slot) release() {
	if s.fd >= 0 {
		if s.dead {
			shutdown(s.fd)
		}
		unix.Close(s.fd)
		s.fd = -1
	}
}

// watch waits for the end of a device's connections.
type watch struct {
	d *Device
	// r is readable when the sockets have changed, or the watch is closed.
	r, w   int
	closed atomic.Bool
	over   chan struct{} // closed when run has returned
}

func newWatch(d *Device) (*watch, error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return nil, os.NewSyscallError("pipe2", err)
	}
	w := &watch{d: d, r: p[0], w: p[1], over: make(chan struct{})}
	go w.run()
	return w, nil
}

// wake makes the watch look at the sockets anew.
func (w *watch) wake() { unix.Write(w.w, []byte{0}) }

func (w *watch) close() {
	w.closed.Store(true)
	w.wake()
	<-w.over
	unix.Close(w.r)
	unix.Close(w.w)
}

// run polls duplicates of the sockets, for the device may close its own at any
// time. Only the end of a connection wakes it, not the data on it.
func (w *watch) run() {
	defer close(w.over)
	for !w.closed.Load() {
		polled := []unix.PollFd{{Fd: int32(w.r), Events: unix.POLLIN}}
		w.d.mu.Lock()
		for _, s := range w.d.slots {
			if s.dead || s.fd < 0 {
				continue
			}
			if fd, err := unix.FcntlInt(uintptr(s.fd), unix.F_DUPFD_CLOEXEC, 3); err == nil {
				polled = append(polled, unix.PollFd{Fd: int32(fd), Events: unix.POLLRDHUP})
			}
		}
		w.d.mu.Unlock()
		w.await(polled)
		for _, p := range polled[1:] {
			forget(p.Fd)
		}
	}
}

// await returns when the watch was woken. Of sockets that end it tells Run, and
// then polls the others.
func (w *watch) await(polled []unix.PollFd) {
	for {
		_, err := unix.Poll(polled, -1)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			w.d.cfg.Log.Error("poll of the connections", "err", err)
			return
		}
		if polled[0].Revents != 0 {
			var p [64]byte
			unix.Read(w.r, p[:])
			return
		}
		for i := range polled[1:] {
			if p := &polled[1+i]; p.Revents&hangup != 0 {
				forget(p.Fd)
				p.Fd = -1 // which poll passes by
				w.d.hurts()
			}
		}
	}
}

func forget(fd int32) {
	if fd >= 0 {
		unix.Close(int(fd))
	}
}
