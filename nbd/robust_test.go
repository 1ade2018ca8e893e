package nbd_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/block/blocktest"
	"firn.io/firn/nbd"
	"firn.io/firn/nbd/client"
	"firn.io/firn/nbd/device"
	"firn.io/firn/nbd/wire"
)

// pipe serves one end of a net.Pipe, in the bubble of synctest's time; ended
// gives what ServeConn returned.
func pipe(s *nbd.Server) (client net.Conn, ended chan error) {
	client, server := net.Pipe()
	ended = make(chan error, 1)
	go func() { ended <- s.ServeConn(server) }()
	return client, ended
}

// TestStalledHandshake: whatever a client does, the handshake is over after ten
// seconds.
func TestStalledHandshake(t *testing.T) {
	for name, stall := range map[string]func(nc net.Conn){
		"silent":   func(nc net.Conn) {},
		"greeting": func(nc net.Conn) { io.ReadFull(nc, make([]byte, wire.GreetingLen)) },
		"trickle": func(nc net.Conn) {
			io.ReadFull(nc, make([]byte, wire.GreetingLen))
			nc.Write(wire.AppendClientFlags(nil, wire.ClientFixedNewstyle))
			for _, b := range wire.AppendOption(nil, wire.OptGo, make([]byte, 1000)) {
				<-time.After(time.Second)
				if _, err := nc.Write([]byte{b}); err != nil {
					return
				}
			}
		},
		"options": func(nc net.Conn) {
			io.ReadFull(nc, make([]byte, wire.GreetingLen))
			nc.Write(wire.AppendClientFlags(nil, wire.ClientFixedNewstyle))
			for {
				<-time.After(2 * time.Second)
				if _, err := nc.Write(wire.AppendOption(nil, wire.OptStartTLS, nil)); err != nil {
					return
				}
				nc.Read(make([]byte, 1000))
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				_, exports := newVolume(blocktest.Options{})
				s := nbd.NewServer(exports, nbd.Options{})
				start := time.Now()
				nc, ended := pipe(s)
				var wg sync.WaitGroup
				wg.Go(func() { stall(nc) })
				err := <-ended
				took := time.Since(start)
				wg.Wait()
				if !errors.Is(err, os.ErrDeadlineExceeded) || took != 10*time.Second {
					t.Errorf("ended after %v: %v", took, err)
				}
				if st := s.Stats(); st.HandshakeFailures != 1 || st.Connections != 0 {
					t.Errorf("counted %+v", st)
				}
			})
		})
	}
}

// TestSlowOpen: attaching may take longer than the handshake, up to a limit of
// its own.
func TestSlowOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCatalog("vol")
		s := nbd.NewServer(slowExports{c, 30 * time.Second}, nbd.Options{})
		nc, ended := pipe(s)
		rawOn(t, nc, rawFlags).enter("vol", false)
		nc.Close()
		if <-ended; c.ends.Load() != 1 {
			t.Errorf("%d closed", c.ends.Load())
		}
		s = nbd.NewServer(slowExports{c, time.Hour}, nbd.Options{})
		nc, _ = pipe(s)
		start := time.Now()
		rawOn(t, nc, rawFlags).wantRefusal(wire.OptGo, wire.AppendInfoRequest(nil, "vol"), wire.RepErrShutdown)
		if took := time.Since(start); took != time.Minute {
			t.Errorf("refused after %v", took)
		}
		s.Close()
	})
}

// slowExports takes its time to open.
type slowExports struct {
	*catalog
	d time.Duration
}

func (s slowExports) Open(ctx context.Context, name string) (*nbd.Export, error) {
	select {
	case <-time.After(s.d):
		return s.catalog.Open(ctx, name)
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// TestStalledClient: one that reads no replies, or does not finish a payload,
// is left after the stall time, and nothing of it stays.
func TestStalledClient(t *testing.T) {
	for name, stall := range map[string]func(r *raw){
		"reads nothing": func(r *raw) {
			for range 40 {
				if _, err := r.nc.Write(wire.AppendRequest(nil, wire.SimpleReplies, wire.Request{Length: 64 << 10})); err != nil {
					return
				}
			}
		},
		"half a payload": func(r *raw) { r.request(wire.CmdWrite, 0, 0, 4096, make([]byte, 1000)) },
		"half a refused payload": func(r *raw) {
			r.request(wire.CmdWrite, 0, volBytes, 4096, make([]byte, 1000))
		},
		"half a request": func(r *raw) { r.send(make([]byte, 10)) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d, exports := newVolume(blocktest.Options{})
				s := nbd.NewServer(exports, nbd.Options{})
				nc, ended := pipe(s)
				r := rawOn(t, nc, rawFlags)
				r.enter("vol", false)
				// An hour of silence between requests is no stall.
				<-time.After(time.Hour)
				r.alive()
				start := time.Now()
				var wg sync.WaitGroup
				wg.Go(func() { stall(r) })
				err := <-ended
				took := time.Since(start)
				wg.Wait()
				if took < 30*time.Second || took > time.Minute {
					t.Errorf("left after %v: %v", took, err)
				}
				if st := s.Stats(); d.Lent() != 0 || st.InFlightBytes != 0 || st.Connections != 0 {
					t.Errorf("%d loans left, %+v", d.Lent(), st)
				}
			})
		})
	}
}

// TestConnectionCap: a connection too many is closed at once, and a place is
// free again when one leaves.
func TestConnectionCap(t *testing.T) {
	_, exports := newVolume(blocktest.Options{})
	ended := make(chan struct{}, 8)
	x := exports.(nbd.Fixed)
	x[0].Close = func() { ended <- struct{}{} }
	addr, s := serve(t, x, nbd.Options{MaxConnections: 2})
	a, b := rawEnter(t, addr, "vol", false), rawEnter(t, addr, "vol", false)
	c, err := net.Dial("unix", addr[len("unix:"):])
	if err != nil {
		t.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, c); n != 0 {
		t.Errorf("the third was told %d bytes, %v", n, err)
	}
	// A client is counted as entered just after it was told that it has.
	a.alive()
	b.alive()
	if st := s.Stats(); st.Refused != 1 || st.Accepted != 2 || st.Connections != 2 || st.Entered != 2 {
		t.Errorf("counted %+v", st)
	}
	a.request(wire.CmdDisc, 0, 0, 0, nil)
	a.wantClosed()
	<-ended
	// The place is free once the connection has been forgotten, just after.
	for s.Stats().Connections != 1 {
		runtime.Gosched()
	}
	rawEnter(t, addr, "vol", false).alive()
}

// hang makes a device wait until release is closed or the request canceled.
func hang(op blocktest.Op, entered *atomic.Int64, release <-chan struct{}) func(context.Context, blocktest.Op, int64, int64) error {
	return func(ctx context.Context, o blocktest.Op, _, _ int64) error {
		if o != op {
			return nil
		}
		entered.Add(1)
		select {
		case <-release:
			return nil
		case <-ctx.Done():
			return block.Wrap(block.Canceled, ctx.Err(), "%s", o)
		}
	}
}

// TestBudgets: clients of a volume that hangs can make the server hold its
// limits and no more, and the clients of another volume do not notice.
func TestBudgets(t *testing.T) {
	var entered atomic.Int64
	release := make(chan struct{})
	stuck := blocktest.New(blocktest.Options{Name: "stuck", Bytes: 1 << 30, NoLending: true, Before: hang(blocktest.OpRead, &entered, release)})
	good := blocktest.New(blocktest.Options{Name: "good", Bytes: 1 << 30, NoLending: true})
	addr, s := serve(t, nbd.Fixed{*device.Export(stuck, nil), *device.Export(good, nil)}, nbd.Options{TotalBytes: 64 << 20})
	var conns []*raw
	for range 4 {
		r := rawEnter(t, addr, "stuck", false)
		for i := range 10 {
			r.request(wire.CmdRead, 0, uint64(i)<<25, 32<<20, nil)
		}
		conns = append(conns, r)
	}
	for s.Stats().InFlightBytes < 32<<20 {
		runtime.Gosched()
	}
	for range 100 {
		if held := s.Stats().InFlightBytes; held > 68<<20 {
			t.Fatalf("%d bytes in flight", held)
		}
		runtime.Gosched()
	}
	c := dial(t, addr, client.Options{Export: "good", Simple: true})
	for i := range 50 {
		if err := c.Do(t.Context(), &client.Call{Command: wire.CmdRead, Off: uint64(i) << 20, Data: make([]byte, 1<<20)}); err != nil {
			t.Fatal(err)
		}
	}
	close(release)
	// All at once: a reply that nobody reads keeps its memory.
	var wg sync.WaitGroup
	for _, r := range conns {
		wg.Go(func() {
			for range 10 {
				if n, err := io.CopyN(io.Discard, r.nc, wire.SimpleReplyLen+32<<20); err != nil {
					t.Errorf("%d bytes of a reply: %v", n, err)
				}
			}
		})
	}
	wg.Wait()
}

// TestManySmallInFlight: more requests than workers wait their turn.
func TestManySmallInFlight(t *testing.T) {
	var entered atomic.Int64
	release := make(chan struct{})
	d := blocktest.New(blocktest.Options{Name: "vol", Bytes: volBytes, Before: hang(blocktest.OpWrite, &entered, release)})
	addr, _ := serve(t, nbd.Fixed{*device.Export(d, nil)}, nbd.Options{Workers: 3})
	r := rawEnter(t, addr, "vol", false)
	for i := range 50 {
		r.request(wire.CmdWrite, 0, uint64(i)*512, 512, make([]byte, 512))
	}
	for entered.Load() < 3 {
		runtime.Gosched()
	}
	if n := entered.Load(); n != 3 {
		t.Errorf("%d calls at once", n)
	}
	close(release)
	seen := map[uint64]bool{}
	for range 50 {
		seen[r.reply(0).Cookie] = true
	}
	if len(seen) != 50 {
		t.Errorf("%d replies", len(seen))
	}
}

// TestClientLeavesHungVolume: a client that goes while the server waits for a
// worker, or for memory, keeps neither its connection nor its export (F6),
// however much it sent before and though the volume answers nothing.
func TestClientLeavesHungVolume(t *testing.T) {
	for _, tc := range []struct {
		name        string
		count, size int
		disconnects bool
	}{{"workers", 50, 512, false}, {"memory", 50, 32 << 20, false}, {"end", 2, 512, true}} {
		t.Run(tc.name, func(t *testing.T) {
			var entered atomic.Int64
			d := blocktest.New(blocktest.Options{Name: "vol", Bytes: 1 << 30, NoLending: true, Before: hang(blocktest.OpRead, &entered, nil)})
			left := make(chan struct{})
			addr, s := serve(t, nbd.Fixed{*device.Export(d, func() { close(left) })}, nbd.Options{Workers: 3, StallTimeout: 50 * time.Millisecond})
			r := rawEnter(t, addr, "vol", false)
			for range tc.count {
				r.request(wire.CmdRead, 0, 0, uint32(tc.size), nil)
			}
			if tc.disconnects {
				r.request(wire.CmdDisc, 0, 0, 0, nil)
			}
			for entered.Load() == 0 {
				runtime.Gosched()
			}
			r.nc.Close()
			<-left
			for st := s.Stats(); st.Connections != 0 || st.InFlightBytes != 0; st = s.Stats() {
				runtime.Gosched()
			}
		})
	}
}

// TestReadsForNobody: reads that a client left behind unanswered are not done.
func TestReadsForNobody(t *testing.T) {
	const requests = 400
	var entered atomic.Int64
	release := make(chan struct{})
	d := blocktest.New(blocktest.Options{Name: "vol", Bytes: volBytes, NoLending: true, Before: hang(blocktest.OpRead, &entered, release)})
	left := make(chan struct{})
	addr, _ := serve(t, nbd.Fixed{*device.Export(d, func() { close(left) })}, nbd.Options{Workers: 3})
	r := rawEnter(t, addr, "vol", false)
	var all []byte
	for i := range requests {
		all = wire.AppendRequest(all, wire.SimpleReplies, wire.Request{Command: wire.CmdRead, Cookie: uint64(i), Length: 4096})
	}
	r.send(all) // at once, so that the server has them all in its buffer
	for entered.Load() == 0 {
		runtime.Gosched()
	}
	r.nc.Close()
	close(release)
	<-left
	if n := entered.Load(); n > requests/2 {
		t.Errorf("%d of %d reads were done after the client had left", n, requests)
	}
}

// TestDisconnectBehindRequests: what a client sent before NBD_CMD_DISC is carried
// out though it did not wait for that.
func TestDisconnectBehindRequests(t *testing.T) {
	var entered atomic.Int64
	release := make(chan struct{})
	d := blocktest.New(blocktest.Options{Name: "vol", Bytes: volBytes, Before: hang(blocktest.OpWrite, &entered, release)})
	left := make(chan struct{})
	addr, _ := serve(t, nbd.Fixed{*device.Export(d, func() { close(left) })}, nbd.Options{Workers: 3})
	r := rawEnter(t, addr, "vol", false)
	for i := range 50 {
		r.request(wire.CmdWrite, 0, uint64(i)*512, 512, make([]byte, 512))
	}
	r.request(wire.CmdDisc, 0, 0, 0, nil)
	if err := r.nc.(*net.UnixConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	close(release)
	<-left
	if n := entered.Load(); n != 50 {
		t.Errorf("%d of 50 writes were carried out", n)
	}
}

// TestShutdown: what is in flight is answered, what comes later is told
// ESHUTDOWN, the export is flushed, and all sockets are closed.
func TestShutdown(t *testing.T) {
	var entered atomic.Int64
	release := make(chan struct{})
	d := blocktest.New(blocktest.Options{Name: "vol", Bytes: volBytes, Before: hang(blocktest.OpWrite, &entered, release)})
	l, err := nbd.Listen(t.Context(), "unix:"+filepath.Join(shortDir(t), "s"))
	if err != nil {
		t.Fatal(err)
	}
	var closed atomic.Bool
	s := nbd.NewServer(nbd.Fixed{*device.Export(d, func() { closed.Store(true) })}, nbd.Options{})
	served := make(chan error)
	go func() { served <- s.Serve(l) }()
	addr := "unix:" + l.Addr().String()
	idle := rawDial(t, addr, rawFlags)
	idle.wantAck(wire.OptList, nil)
	r := rawEnter(t, addr, "vol", false)
	write := r.request(wire.CmdWrite, 0, 0, 4096, bytes.Repeat([]byte{7}, 4096))
	for entered.Load() == 0 {
		runtime.Gosched()
	}
	down := make(chan error)
	go func() { down <- s.Shutdown(t.Context()) }()
	if err := <-served; err != nbd.ErrServerClosed {
		t.Errorf("serve: %v", err)
	}
	idle.wantClosed()
	if _, err := net.Dial("unix", l.Addr().String()); err == nil {
		t.Errorf("still listening")
	}
	r.wantErrno(wire.ESHUTDOWN, wire.CmdRead, 0, 0, 4096, nil)
	r.wantErrno(wire.ESHUTDOWN, wire.CmdWrite, 0, 4096, 4096, make([]byte, 4096))
	r.wantErrno(wire.ESHUTDOWN, wire.CmdFlush, 0, 0, 0, nil)
	close(release)
	if p := r.reply(0); p.Cookie != write || p.Errno != 0 {
		t.Errorf("the write in flight was answered %+v", p.Reply)
	}
	r.wantClosed()
	if err := <-down; err != nil {
		t.Errorf("shutdown: %v", err)
	}
	if d.Flushes() != 1 || !closed.Load() {
		t.Errorf("flushed %d times, export closed %v", d.Flushes(), closed.Load())
	}
	if err := s.Serve(l); err != nbd.ErrServerClosed {
		t.Errorf("serve after shutdown: %v", err)
	}
}

// TestShutdownGivesUp: when its time is over, requests are canceled.
func TestShutdownGivesUp(t *testing.T) {
	var entered atomic.Int64
	d := blocktest.New(blocktest.Options{Name: "vol", Bytes: volBytes, Before: hang(blocktest.OpFlush, &entered, nil)})
	s := nbd.NewServer(nbd.Fixed{*device.Export(d, nil)}, nbd.Options{})
	a, b := net.Pipe()
	ended := make(chan error, 1)
	go func() { ended <- s.ServeConn(b) }()
	r := rawOn(t, a, rawFlags)
	r.enter("vol", false)
	r.request(wire.CmdFlush, 0, 0, 0, nil)
	for entered.Load() == 0 {
		runtime.Gosched()
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Shutdown(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("shutdown: %v", err)
	}
	<-ended
}

// TestManyConnections: clients that come, work and leave in all ways at once
// leave nothing behind.
func TestManyConnections(t *testing.T) {
	c := newCatalog("a", "b")
	addr, s := serve(t, c, nbd.Options{})
	var wg sync.WaitGroup
	for i := range 40 {
		wg.Go(func() {
			o := client.Options{Export: c.names[i%2], Simple: i%3 == 0}
			conn, err := client.Dial(t.Context(), addr, o)
			if err != nil {
				t.Error(err)
				return
			}
			load := client.Load{Depth: 1 + i%7, Bytes: 512 << (i % 8), Span: 1 << 20, Write: i%4 == 0, Seed: uint64(i)}
			if err := load.Run(conn, 50); err != nil {
				t.Error(err)
			}
			if i%2 == 0 {
				err = conn.Close()
			} else {
				err = conn.Abort()
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for s.Stats().Connections != 0 {
		runtime.Gosched()
	}
	if st := s.Stats(); st.InFlightBytes != 0 || st.Requests[wire.CmdRead]+st.Requests[wire.CmdWrite] != 2000 || c.ends.Load() != 40 {
		t.Errorf("%+v, %d closed", st, c.ends.Load())
	}
	for name, d := range c.devices {
		if n := d.Lent(); n != 0 {
			t.Errorf("%d loans of %s left", n, name)
		}
	}
}

func TestListen(t *testing.T) {
	dir := shortDir(t)
	path := filepath.Join(dir, "s")
	l, err := nbd.Listen(t.Context(), "unix:"+path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := nbd.Listen(t.Context(), "unix:"+path); err == nil {
		t.Errorf("listened twice on a socket")
	}
	// A process that was killed leaves its socket file.
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	if l, err = nbd.Listen(t.Context(), "unix:"+path); err != nil {
		t.Errorf("an abandoned socket was not replaced: %v", err)
	} else {
		l.Close()
	}
	file := filepath.Join(dir, "f")
	if err := os.WriteFile(file, []byte("kept"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := nbd.Listen(t.Context(), "unix:"+file); err == nil {
		t.Errorf("listened in place of a file")
	}
	if kept, err := os.ReadFile(file); err != nil || string(kept) != "kept" {
		t.Errorf("the file is gone: %v", err)
	}
	tcp, err := nbd.Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	if _, err := nbd.Listen(t.Context(), tcp.Addr().String()); err == nil {
		t.Errorf("listened twice on a port")
	}
	if got := nbd.URI(tcp.Addr(), "a b/c"); got != "nbd://"+tcp.Addr().String()+"/a%20b%2Fc" {
		t.Errorf("URI %s", got)
	}
	if got := nbd.URI(&net.UnixAddr{Net: "unix", Name: "/run/x"}, "v"); got != "nbd+unix:///v?socket=%2Frun%2Fx" {
		t.Errorf("URI %s", got)
	}
}
