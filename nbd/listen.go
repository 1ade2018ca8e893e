package nbd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"strings"
	"syscall"
	"time"
)

// DefaultPort is the port that IANA gave to NBD.
const DefaultPort = "10809"

// Listen opens "HOST:PORT", "HOST" (on DefaultPort) or "unix:PATH". A socket
// file that nobody listens on any more is replaced; anything else at PATH is
// left alone and refused.
func Listen(ctx context.Context, addr string) (net.Listener, error) {
	var lc net.ListenConfig
	path, unix := strings.CutPrefix(addr, "unix:")
	if !unix {
		if _, _, err := net.SplitHostPort(addr); err != nil {
			addr = net.JoinHostPort(strings.Trim(addr, "[]"), DefaultPort)
		}
		l, err := lc.Listen(ctx, "tcp", addr)
		if err != nil {
			return nil, fmt.Errorf("listen for NBD on %s: %w", addr, err)
		}
		return l, nil
	}
	l, err := lc.Listen(ctx, "unix", path)
	if errors.Is(err, syscall.EADDRINUSE) && abandoned(ctx, path) {
		if err = os.Remove(path); err == nil {
			l, err = lc.Listen(ctx, "unix", path)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("listen for NBD on socket %s: %w", path, err)
	}
	return l, nil
}

// abandoned tells whether path is a socket that nobody listens on.
func abandoned(ctx context.Context, path string) bool {
	if st, err := os.Lstat(path); err != nil || st.Mode().Type() != os.ModeSocket {
		return false
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err == nil {
		conn.Close()
	}
	return errors.Is(err, syscall.ECONNREFUSED)
}

// URI returns what clients call the export of a server that listens at addr.
func URI(addr net.Addr, export string) string {
	if addr.Network() == "unix" {
		return "nbd+unix:///" + url.PathEscape(export) + "?socket=" + url.QueryEscape(addr.String())
	}
	return "nbd://" + addr.String() + "/" + url.PathEscape(export)
}

// prepare sets up an accepted socket: no delay, and probes that find out within
// about 90 s that a silent peer is gone.
func prepare(nc net.Conn) {
	tcp, ok := nc.(*net.TCPConn)
	if !ok {
		return
	}
	// A socket on which these fail is already closed; the first read says so.
	_ = tcp.SetNoDelay(true)
	_ = tcp.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: 30 * time.Second, Interval: 10 * time.Second, Count: 6})
}
