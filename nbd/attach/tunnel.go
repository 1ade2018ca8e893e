package attach

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// tunnelBytes is the buffer of each direction of a tunnel.
const tunnelBytes = 256 << 10

// tlsOf returns the configuration for a server, or nil without TLS.
func (c *Config) tlsOf(addr string) *tls.Config {
	if c.TLS == nil || c.TLS.ServerName != "" {
		return c.TLS
	}
	out := c.TLS.Clone()
	out.ServerName = "localhost" // of unix:PATH
	if host, _, err := net.SplitHostPort(addr); err == nil {
		out.ServerName = host
	}
	return out
}

// tunnels carry data between the kernel, which has no TLS, and servers. A tunnel
// ends when one of its two connections does, and ends the other: the kernel then
// repeats what has no answer, as after any lost connection.
type tunnels struct {
	mu     sync.Mutex
	live   map[*tunnel]struct{}
	closed bool
	over   sync.WaitGroup
}

type tunnel struct {
	server *tls.Conn
	kernel net.Conn
}

// end ends both connections, without a goodbye that could wait for its reader.
func (t *tunnel) end() {
	t.server.NetConn().Close()
	t.kernel.Close()
}

// open starts a tunnel to server, which it owns from then on, and returns the
// kernel's end of it.
func (ts *tunnels) open(server *tls.Conn) (fd int, err error) {
	if err := patience(server.NetConn()); err != nil {
		return -1, errors.Join(err, server.NetConn().Close())
	}
	var pair [2]int
	if pair, err = unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return -1, errors.Join(os.NewSyscallError("socketpair", err), server.NetConn().Close())
	}
	file := os.NewFile(uintptr(pair[1]), "tunnel")
	kernel, err := net.FileConn(file)
	file.Close()
	if err != nil {
		unix.Close(pair[0])
		return -1, errors.Join(err, server.NetConn().Close())
	}
	t := &tunnel{server, kernel}
	ts.mu.Lock()
	defer ts.mu.Unlock()
	if ts.closed {
		unix.Close(pair[0])
		t.end()
		return -1, net.ErrClosed
	}
	if ts.live == nil {
		ts.live = map[*tunnel]struct{}{}
	}
	ts.live[t] = struct{}{}
	ts.over.Go(func() { ts.carry(t, server, kernel) })
	ts.over.Go(func() { ts.carry(t, kernel, server) })
	return pair[0], nil
}

// carry copies one direction until the tunnel is over.
func (ts *tunnels) carry(t *tunnel, to io.Writer, from io.Reader) {
	// The structs hide WriteTo and ReadFrom, which have buffers of their own.
	io.CopyBuffer(struct{ io.Writer }{to}, struct{ io.Reader }{from}, make([]byte, tunnelBytes))
	t.end()
	ts.mu.Lock()
	delete(ts.live, t)
	ts.mu.Unlock()
}

// close ends all tunnels and waits for them.
func (ts *tunnels) close() {
	ts.mu.Lock()
	ts.closed = true
	for t := range ts.live {
		t.end()
	}
	ts.mu.Unlock()
	ts.over.Wait()
}
