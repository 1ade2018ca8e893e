package nbd_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/block/blocktest"
	"firn.io/firn/nbd"
	"firn.io/firn/nbd/client"
	"firn.io/firn/nbd/device"
	"firn.io/firn/nbd/wire"
)

func sessionOf(id byte, connection uint32, incarnation uint64) wire.Session {
	return wire.Session{ID: [16]byte{id}, Connection: connection, Incarnation: incarnation}
}

// TestSessionTakesOver: a device that comes back is let in only when nothing of
// its older connection can take effect any more: the write that it left in
// flight has ended, and those that the server had not begun never are.
func TestSessionTakesOver(t *testing.T) {
	var entered atomic.Int64
	var ended atomic.Bool
	release := make(chan struct{})
	d := blocktest.New(blocktest.Options{Name: "vol", Bytes: volBytes, Before: func(ctx context.Context, op blocktest.Op, off, n int64) error {
		if op != blocktest.OpWrite {
			return nil
		}
		entered.Add(1)
		<-ctx.Done() // the old connection is told to end ...
		<-release    // ... and ends in its own time
		ended.Store(true)
		return ctx.Err()
	}})
	addr, s := serve(t, nbd.Fixed{*device.Export(d, nil)}, nbd.Options{Workers: 1})
	old := rawDial(t, addr, rawFlags)
	old.wantAck(wire.OptSession, wire.AppendSession(nil, sessionOf(1, 0, 1)))
	old.enter("vol", false)
	for i := range 20 {
		old.request(wire.CmdWrite, 0, uint64(i)*4096, 4096, bytes.Repeat([]byte{9}, 4096))
	}
	for entered.Load() == 0 {
		runtime.Gosched()
	}
	// Another device, and a device without a session, are not its concern.
	other := dial(t, addr, client.Options{Session: sessionOf(2, 0, 1)})
	stock := dial(t, addr, client.Options{})

	again := rawDial(t, addr, rawFlags)
	again.wantAck(wire.OptSession, wire.AppendSession(nil, sessionOf(1, 0, 2)))
	again.send(wire.AppendOption(nil, wire.OptGo, wire.AppendInfoRequest(nil, "vol")))
	old.wantClosed()
	again.nc.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	if n, err := again.nc.Read(make([]byte, 1)); n != 0 {
		t.Fatalf("let in while a write of the older connection is in flight (%v)", err)
	}
	again.nc.SetReadDeadline(time.Now().Add(20 * time.Second))
	close(release)
	for again.answer(wire.OptGo).reply != wire.RepAck {
	}
	if !ended.Load() {
		t.Errorf("let in before the write ended")
	}
	if n := entered.Load(); n != 1 {
		t.Errorf("%d writes of the older connection were begun", n)
	}
	again.alive()
	for _, c := range []*client.Conn{other, stock} {
		if err := c.Do(t.Context(), &client.Call{Command: wire.CmdFlush}); err != nil {
			t.Error(err)
		}
	}
	if st := s.Stats(); st.Superseded != 1 {
		t.Errorf("%+v", st)
	}
}

// TestSessionOrder: which connections take whose place.
func TestSessionOrder(t *testing.T) {
	_, exports := newVolume(blocktest.Options{})
	addr, s := serve(t, exports, nbd.Options{})
	conns := map[wire.Session]*client.Conn{}
	alive := func(want ...wire.Session) {
		t.Helper()
		for _, session := range want {
			if err := conns[session].Do(t.Context(), &client.Call{Command: wire.CmdFlush}); err != nil {
				t.Errorf("%v: %v", session, err)
			}
		}
		for s.Stats().Connections != len(want) {
			runtime.Gosched()
		}
	}
	enter := func(session wire.Session) {
		t.Helper()
		conns[session] = dial(t, addr, client.Options{Session: session})
		if !conns[session].Export().Session {
			t.Errorf("the server does not know sessions")
		}
	}
	a1, b1, a2, b2 := sessionOf(1, 0, 1), sessionOf(1, 1, 1), sessionOf(1, 0, 2), sessionOf(1, 1, 2)
	enter(a1)
	enter(b1)
	alive(a1, b1)
	enter(b1) // one of two was lost: the other stays
	alive(a1, b1)
	enter(a2)
	alive(a2)
	enter(b2)
	alive(a2, b2)
	_, err := client.Dial(t.Context(), addr, client.Options{Session: b1})
	var refused *client.OptionError
	if !errors.As(err, &refused) || refused.Reply != wire.RepErrPolicy {
		t.Errorf("an older incarnation: %v", err)
	}
	for s.Stats().Connections != 2 {
		runtime.Gosched()
	}
	n, err := s.Disconnect(t.Context(), func(c nbd.Client, export nbd.Info) bool {
		return export.Name == "vol" && export.ID != "" && c.Session == a2
	})
	if n != 1 || err != nil {
		t.Errorf("disconnected %d, %v", n, err)
	}
	alive(b2)
}

// TestSessionWaitsForAHungVolume: what does not end keeps the newer connection
// out, with a refusal in the end.
func TestSessionWaitsForAHungVolume(t *testing.T) {
	var entered atomic.Int64
	release := make(chan struct{})
	d := blocktest.New(blocktest.Options{Name: "vol", Bytes: volBytes, Before: func(_ context.Context, op blocktest.Op, _, _ int64) error {
		if op == blocktest.OpWrite {
			entered.Add(1)
			<-release
		}
		return nil
	}})
	addr, _ := serve(t, nbd.Fixed{*device.Export(d, nil)}, nbd.Options{OpenTimeout: 20 * time.Millisecond})
	old := rawDial(t, addr, rawFlags)
	old.wantAck(wire.OptSession, wire.AppendSession(nil, sessionOf(1, 0, 1)))
	old.enter("vol", false)
	old.request(wire.CmdWrite, 0, 0, 512, make([]byte, 512))
	for entered.Load() == 0 {
		runtime.Gosched()
	}
	r := rawDial(t, addr, rawFlags)
	r.wantRefusal(wire.OptSession, make([]byte, wire.SessionLen), wire.RepErrInvalid)
	r.wantRefusal(wire.OptSession, []byte("short"), wire.RepErrInvalid)
	r.wantAck(wire.OptSession, wire.AppendSession(nil, sessionOf(1, 0, 2)))
	r.wantRefusal(wire.OptGo, wire.AppendInfoRequest(nil, "vol"), wire.RepErrShutdown)
	r.wantRefusal(wire.OptGo, wire.AppendInfoRequest(nil, "vol"), wire.RepErrShutdown)
	close(release)
	for {
		answers := r.option(wire.OptGo, wire.AppendInfoRequest(nil, "vol"))
		if answers[len(answers)-1].reply == wire.RepAck {
			break
		}
	}
	r.alive()
}

// TestEnter: the socket that is handed over is at the first request.
func TestEnter(t *testing.T) {
	_, exports := newVolume(blocktest.Options{})
	addr, _ := serve(t, exports, nbd.Options{})
	nc, info, err := client.Enter(t.Context(), addr, client.Options{Export: "vol", Session: sessionOf(1, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	if info.Bytes != volBytes || !info.Session || info.Flags&wire.SendDF != 0 {
		t.Errorf("%+v", info)
	}
	(&raw{t: t, nc: nc}).alive()
}

// TestShutdownAnswersNoErrorToSessions: what a client with a session sends while
// the server stops is not answered, for it sends that again elsewhere; what was
// in flight before is.
func TestShutdownAnswersNoErrorToSessions(t *testing.T) {
	entered, release := make(chan struct{}), make(chan struct{})
	d := blocktest.New(blocktest.Options{Name: "vol", Bytes: volBytes, NoLending: true, Before: func(_ context.Context, op blocktest.Op, off, _ int64) error {
		if op == blocktest.OpWrite && off == 0 {
			close(entered)
			<-release
		}
		return nil
	}})
	addr, s := serve(t, nbd.Fixed{*device.Export(d, nil)}, nbd.Options{})
	idle := rawDial(t, addr, rawFlags)
	idle.enter("vol", false)
	r := rawDial(t, addr, rawFlags)
	r.wantAck(wire.OptSession, wire.AppendSession(nil, sessionOf(1, 0, 1)))
	r.enter("vol", false)
	before := r.request(wire.CmdWrite, 0, 0, 4096, make([]byte, 4096))
	<-entered
	over := make(chan error, 1)
	go func() { over <- s.Shutdown(context.Background()) }()
	// Idle connections end at once; Stats waits for the server to have told all.
	idle.wantClosed()
	s.Stats()
	r.request(wire.CmdWrite, 0, 4096, 4096, make([]byte, 4096))
	close(release)
	if p := r.reply(0); p.Cookie != before || p.Errno != 0 {
		t.Errorf("the write in flight was answered with %+v", p)
	}
	r.wantClosed()
	if err := <-over; err != nil {
		t.Error(err)
	}
}

// TestMovedVolumeAnswersNoErrorToSessions: when the volume is fenced or detached
// under a client with a session, its connection ends without an answer, whatever
// the command and the form of the reply: ESHUTDOWN would be an I/O error on its
// device. A client without one is told.
func TestMovedVolumeAnswersNoErrorToSessions(t *testing.T) {
	var fail atomic.Pointer[error]
	d := blocktest.New(blocktest.Options{Name: "vol", Bytes: volBytes, NoLending: true, Before: func(context.Context, blocktest.Op, int64, int64) error {
		if err := fail.Load(); err != nil {
			return *err
		}
		return nil
	}})
	addr, s := serve(t, nbd.Fixed{*device.Export(d, nil)}, nbd.Options{})
	incarnation, want := uint64(0), uint64(0)
	for _, err := range []error{block.Errorf(block.Fenced, "x"), block.Errorf(block.Canceled, "x"), fmt.Errorf("x: %w", context.Canceled)} {
		for _, structured := range []bool{false, true} {
			for _, c := range []struct {
				cmd wire.Command
				n   uint32
			}{{wire.CmdRead, 512}, {wire.CmdRead, 32 << 20}, {wire.CmdWrite, 512}, {wire.CmdFlush, 0}, {wire.CmdTrim, 4096}, {wire.CmdWriteZeroes, 4096}} {
				fail.Store(nil)
				incarnation++
				r := rawDial(t, addr, rawFlags)
				r.wantAck(wire.OptSession, wire.AppendSession(nil, sessionOf(1, 0, incarnation)))
				r.enter("vol", structured)
				r.alive()
				fail.Store(&err)
				var data []byte
				if c.cmd == wire.CmdWrite {
					data = make([]byte, c.n)
				}
				r.request(c.cmd, 0, 0, c.n, data)
				if n, _ := r.nc.Read(make([]byte, 1)); n != 0 {
					t.Fatalf("%s was answered", c.cmd)
				}
				want++
			}
		}
		rawEnter(t, addr, "vol", false).wantErrno(wire.ESHUTDOWN, wire.CmdRead, 0, 0, 512, nil)
	}
	for s.Stats().Moved != want {
		runtime.Gosched()
	}
	// Other errors are answered.
	other := error(block.Errorf(block.NoSpace, "x"))
	fail.Store(nil)
	r := rawDial(t, addr, rawFlags)
	r.wantAck(wire.OptSession, wire.AppendSession(nil, sessionOf(1, 0, incarnation+1)))
	r.enter("vol", false)
	fail.Store(&other)
	r.wantErrno(wire.ENOSPC, wire.CmdWrite, 0, 0, 512, make([]byte, 512))
}
