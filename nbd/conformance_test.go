package nbd_test

import (
	"context"
	"net"
	"path/filepath"
	"testing"
	"time"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/block/blocktest"
	"firn.io/firn/nbd"
	"firn.io/firn/nbd/client"
	"firn.io/firn/nbd/device"
	"firn.io/firn/nbd/nbdtest"
)

// serve runs a server of exports at a socket of its own until the test ends,
// and returns its address for the client, and it.
func serve(t testing.TB, exports nbd.Exports, opt nbd.Options) (addr string, s *nbd.Server) {
	t.Helper()
	// t.TempDir is too long for a socket in some subtests.
	addr = "unix:" + filepath.Join(shortDir(t), "s")
	return addr, serveAt(t, addr, exports, opt)
}

func serveAt(t testing.TB, addr string, exports nbd.Exports, opt nbd.Options) *nbd.Server {
	t.Helper()
	l, err := nbd.Listen(t.Context(), addr)
	if err != nil {
		t.Fatal(err)
	}
	return serveOn(t, l, exports, opt)
}

func serveOn(t testing.TB, l net.Listener, exports nbd.Exports, opt nbd.Options) *nbd.Server {
	s := nbd.NewServer(exports, opt)
	done := make(chan error)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			t.Errorf("shutdown: %v", err)
		}
		if err := <-done; err != nbd.ErrServerClosed {
			t.Errorf("serve: %v", err)
		}
		if n := s.Stats().InFlightBytes; n != 0 {
			t.Errorf("%d bytes in flight after the end", n)
		}
	})
	return s
}

func dial(t testing.TB, addr string, o client.Options) *client.Conn {
	t.Helper()
	c, err := client.Dial(t.Context(), addr, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Abort() })
	return c
}

// TestConformance runs the suite of block.Device through the protocol: what a
// device promises is what an NBD client gets.
func TestConformance(t *testing.T) {
	for _, c := range []struct {
		name  string
		conns int
		lend  bool
		o     client.Options
	}{
		{"structured", 1, true, client.Options{}},
		{"workers", 1, false, client.Options{}},
		{"connections", 3, true, client.Options{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			blocktest.Run(t, func(t testing.TB, size int64) block.Device {
				dev := blocktest.New(blocktest.Options{Bytes: size, NoLending: !c.lend})
				addr, _ := serve(t, nbd.Fixed{*device.Export(dev, nil)}, nbd.Options{})
				var conns []*client.Conn
				for range c.conns {
					conns = append(conns, dial(t, addr, c.o))
				}
				return nbdtest.New(conns...)
			})
		})
	}
}

func TestReadOnlyConformance(t *testing.T) {
	dev := blocktest.New(blocktest.Options{Bytes: 1 << 20})
	want := make([]byte, 9000)
	want[5000] = 7
	if err := dev.WriteAt(t.Context(), want, 0, 0); err != nil {
		t.Fatal(err)
	}
	dev.SetReadOnly(true)
	addr, _ := serve(t, nbd.Fixed{*device.Export(dev, nil)}, nbd.Options{})
	blocktest.RunReadOnly(t, nbdtest.New(dial(t, addr, client.Options{})), want)
}
