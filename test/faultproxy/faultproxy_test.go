package faultproxy_test

import (
	"io"
	"net"
	"testing"
	"time"

	"firn.io/firn/test/faultproxy"
)

// echo serves a TCP echo until the test ends.
func echo(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { io.Copy(c, c); c.Close() }()
		}
	}()
	return l.Addr().String()
}

func dial(t *testing.T, p *faultproxy.Proxy) net.Conn {
	c, err := net.Dial("tcp", p.Addr())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func say(t *testing.T, c net.Conn, s string) {
	t.Helper()
	if _, err := io.WriteString(c, s); err != nil {
		t.Fatal(err)
	}
}

func hear(t *testing.T, c net.Conn, want string) {
	t.Helper()
	b := make([]byte, len(want))
	if _, err := io.ReadFull(c, b); err != nil || string(b) != want {
		t.Fatalf("heard %q, %v; want %q", b, err, want)
	}
}

func TestModes(t *testing.T) {
	p, err := faultproxy.New(echo(t))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	c := dial(t, p)
	say(t, c, "one")
	hear(t, c, "one")

	for _, m := range []faultproxy.Mode{faultproxy.Blackhole, faultproxy.BlackholeToServer, faultproxy.BlackholeToClient} {
		p.Set(m, 0)
		say(t, c, "two")
		c.SetReadDeadline(time.Now().Add(30 * time.Millisecond))
		if n, err := c.Read(make([]byte, 3)); err == nil {
			t.Fatalf("mode %d let %d bytes through", m, n)
		}
		c.SetReadDeadline(time.Time{})
		p.Set(faultproxy.Pass, 0)
		hear(t, c, "two")
	}

	begin := time.Now()
	p.Set(faultproxy.Pass, 20*time.Millisecond)
	say(t, c, "late")
	hear(t, c, "late")
	if d := time.Since(begin); d < 40*time.Millisecond {
		t.Errorf("two delays of 20 ms took %v", d)
	}

	p.Set(faultproxy.Refuse, 0)
	refused := dial(t, p)
	if _, err := refused.Read(make([]byte, 1)); err == nil {
		t.Error("a refused connection answered")
	}
	say(t, c, "still")
	hear(t, c, "still")

	p.Cut()
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("a cut connection answered")
	}
	p.Set(faultproxy.Pass, 0)
	again := dial(t, p)
	say(t, again, "back")
	hear(t, again, "back")
}

func TestHalfCloseReachesTheOtherSide(t *testing.T) {
	p, err := faultproxy.New(echo(t))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	c := dial(t, p)
	say(t, c, "bye")
	c.(*net.TCPConn).CloseWrite()
	all, err := io.ReadAll(c)
	if err != nil || string(all) != "bye" {
		t.Fatalf("%q, %v", all, err)
	}
}
