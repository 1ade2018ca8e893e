package nbd_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math"
	"strings"
	"sync"
	"syscall"
	"testing"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/block/blocktest"
	"firn.io/firn/nbd"
	"firn.io/firn/nbd/client"
	"firn.io/firn/nbd/device"
	"firn.io/firn/nbd/wire"
)

const volBytes = 64 << 20

func newVolume(o blocktest.Options) (*blocktest.Device, nbd.Exports) {
	if o.Bytes == 0 {
		o.Bytes = volBytes
	}
	o.Name = "vol"
	d := blocktest.New(o)
	return d, nbd.Fixed{*device.Export(d, nil)}
}

// TestIllegalRequests: each is refused in the protocol's terms, and the
// connection goes on.
func TestIllegalRequests(t *testing.T) {
	d, exports := newVolume(blocktest.Options{})
	addr, s := serve(t, exports, nbd.Options{})
	page := make([]byte, 4096)
	for _, structured := range []bool{true, false} {
		r := rawEnter(t, addr, "vol", structured)
		for _, c := range []struct {
			want wire.Errno
			cmd  wire.Command
			f    wire.CommandFlags
			off  uint64
			n    uint32
			data []byte
		}{
			{wire.EINVAL, wire.CmdRead, 0, volBytes, 1, nil},
			{wire.EINVAL, wire.CmdRead, 0, volBytes - 1, 2, nil},
			{wire.EINVAL, wire.CmdRead, 0, math.MaxUint64, 4096, nil},
			{wire.EINVAL, wire.CmdRead, 0, math.MaxInt64, 4096, nil},
			{wire.EINVAL, wire.CmdRead, 0, 0, 32<<20 + 1, nil},
			{wire.EINVAL, wire.CmdRead, 0, 0, math.MaxUint32, nil},
			{wire.EINVAL, wire.CmdRead, wire.FlagNoHole, 0, 512, nil},
			{wire.EINVAL, wire.CmdRead, 1 << 15, 0, 512, nil},
			{wire.ENOSPC, wire.CmdWrite, 0, volBytes - 100, 4096, page},
			{wire.ENOSPC, wire.CmdWrite, 0, math.MaxUint64 - 4095, 4096, page},
			{wire.EINVAL, wire.CmdWrite, wire.FlagDF, 0, 4096, page},
			{wire.EINVAL, wire.CmdWrite, wire.FlagReqOne, 0, 4096, page},
			{wire.EINVAL, wire.CmdFlush, 0, 4096, 0, nil},
			{wire.EINVAL, wire.CmdFlush, 0, 0, 1, nil},
			{wire.EINVAL, wire.CmdTrim, 0, volBytes, 1, nil},
			{wire.EINVAL, wire.CmdTrim, 0, 0, volBytes + 1, nil},
			{wire.EINVAL, wire.CmdTrim, wire.FlagNoHole, 0, 4096, nil},
			{wire.ENOSPC, wire.CmdWriteZeroes, 0, 4096, volBytes, nil},
			{wire.EINVAL, wire.CmdWriteZeroes, wire.FlagDF, 0, 4096, nil},
			{wire.EINVAL, wire.CmdCache, 0, volBytes, 4096, nil},
			{wire.EINVAL, wire.CmdBlockStatus, 0, volBytes, 1, nil},
			{wire.EINVAL, wire.CmdBlockStatus, 0, 0, 0, nil},
			{wire.EINVAL, wire.CmdBlockStatus, wire.FlagFastZero, 0, 512, nil},
			{wire.EINVAL, 8, 0, 0, 4096, nil},
			{wire.EINVAL, 77, 0, 0, math.MaxUint32, nil},
		} {
			r.wantErrno(c.want, c.cmd, c.f, c.off, c.n, c.data)
		}
		if !structured {
			r.wantErrno(wire.EINVAL, wire.CmdRead, wire.FlagDF, 0, 512, nil)
			r.wantErrno(wire.EINVAL, wire.CmdBlockStatus, 0, 0, 512, nil)
		}
		// FUA is tolerated on every command; no bytes are no error.
		for _, cmd := range []wire.Command{wire.CmdRead, wire.CmdWrite, wire.CmdTrim, wire.CmdCache, wire.CmdWriteZeroes} {
			r.wantErrno(0, cmd, wire.FlagFUA, 4096, 0, nil)
		}
		r.wantErrno(0, wire.CmdFlush, wire.FlagFUA, 0, 0, nil)
		r.wantErrno(0, wire.CmdTrim, wire.FlagFUA, 0, 4096, nil)
		r.wantErrno(0, wire.CmdWriteZeroes, wire.FlagFUA|wire.FlagNoHole|wire.FlagFastZero, 1, 3, nil)
		r.wantErrno(0, wire.CmdCache, 0, 0, volBytes, nil)
		// A write that is too large is read to its end; the next request counts.
		r.wantErrno(wire.EINVAL, wire.CmdWrite, 0, 0, 32<<20+1, make([]byte, 32<<20+1))
		r.alive()
	}
	if e, err := d.Extents(t.Context(), nil, 0, volBytes, 2); err != nil || len(e) != 1 || e[0].State != block.Hole {
		t.Errorf("the device was changed: %v %v", e, err)
	}
	st := s.Stats()
	if st.Errors[3] < 40 || st.Errors[4] != 6 || st.UnknownRequests != 4 {
		t.Errorf("counted EINVAL %d, ENOSPC %d, unknown %d", st.Errors[3], st.Errors[4], st.UnknownRequests)
	}
}

// TestHangUps: what cannot be answered ends the connection, and only it.
func TestHangUps(t *testing.T) {
	d, exports := newVolume(blocktest.Options{})
	addr, s := serve(t, exports, nbd.Options{})
	other := rawEnter(t, addr, "vol", true)
	for name, send := range map[string]func(r *raw){
		"magic":           func(r *raw) { r.send(bytes.Repeat([]byte{0x42}, wire.RequestLen)) },
		"4 GiB write":     func(r *raw) { r.request(wire.CmdWrite, 0, 0, math.MaxUint32, nil) },
		"cut request":     func(r *raw) { r.send(wire.AppendRequest(nil, wire.SimpleReplies, wire.Request{})[:20]); halfClose(r) },
		"cut payload":     func(r *raw) { r.request(wire.CmdWrite, 0, 0, 8192, make([]byte, 5000)); halfClose(r) },
		"cut big payload": func(r *raw) { r.request(wire.CmdWrite, 0, 4096, 3<<20, make([]byte, 1<<20)); halfClose(r) },
		"option":          func(r *raw) { r.send(wire.AppendOption(nil, wire.OptGo, make([]byte, 99))) },
	} {
		t.Log(name)
		r := rawEnter(t, addr, "vol", false)
		send(r)
		if strings.HasPrefix(name, "cut") {
			// Pieces that arrived may have been written; no reply may say so.
			var rest []byte
			if rest, _ = io.ReadAll(r.nc); len(rest) != 0 {
				if p, err := wire.ParseReply(rest); err != nil || p.Errno == 0 {
					t.Errorf("a cut write was answered with %+v, %v", p, err)
				}
			}
			continue
		}
		r.wantClosed()
	}
	other.alive()
	if e, err := d.Extents(t.Context(), nil, 0, 4096, 1); err != nil || e[0].State != block.Hole {
		t.Errorf("a cut piece was written: %v %v", e, err)
	}
	if n := s.Stats().Violations; n != 3 {
		t.Errorf("%d violations counted, want 3", n)
	}
}

func halfClose(r *raw) {
	r.nc.(interface{ CloseWrite() error }).CloseWrite()
}

// TestBackendErrors: every kind has its number, in both forms of reply, and the
// connection goes on.
func TestBackendErrors(t *testing.T) {
	var mu sync.Mutex
	var fail error
	_, exports := newVolume(blocktest.Options{NoLending: true, Before: func(context.Context, blocktest.Op, int64, int64) error {
		mu.Lock()
		defer mu.Unlock()
		return fail
	}})
	addr, _ := serve(t, exports, nbd.Options{})
	simple, structured := rawEnter(t, addr, "vol", false), rawEnter(t, addr, "vol", true)
	data := make([]byte, 512)
	for _, c := range []struct {
		err         error
		read, write wire.Errno
	}{
		{block.Errorf(block.Internal, "x"), wire.EIO, wire.EIO},
		{block.Errorf(block.NotFound, "x"), wire.EIO, wire.EIO},
		{block.Errorf(block.Invalid, "x"), wire.EINVAL, wire.EINVAL},
		{block.Errorf(block.OutOfRange, "x"), wire.EINVAL, wire.ENOSPC},
		{block.Errorf(block.ReadOnly, "x"), wire.EPERM, wire.EPERM},
		{block.Errorf(block.NoSpace, "x"), wire.ENOSPC, wire.ENOSPC},
		{block.Errorf(block.Fenced, "x"), wire.ESHUTDOWN, wire.ESHUTDOWN},
		{block.Errorf(block.Unavailable, "x"), wire.EIO, wire.EIO},
		{block.Wrap(block.Corrupt, syscall.EINVAL, "x"), wire.EIO, wire.EIO},
		{block.Errorf(block.Canceled, "x"), wire.ESHUTDOWN, wire.ESHUTDOWN},
		{block.Errorf(block.Unsupported, "x"), wire.EINVAL, wire.EINVAL},
		{block.Errorf(block.Kind(200), "x"), wire.EIO, wire.EIO},
		{errors.New("x"), wire.EIO, wire.EIO},
		{syscall.EROFS, wire.EPERM, wire.EPERM},
		{syscall.EDQUOT, wire.ENOSPC, wire.ENOSPC},
		{syscall.ENOENT, wire.EIO, wire.EIO},
		{wire.ENOMEM, wire.ENOMEM, wire.ENOMEM},
		{wire.Errno(0), wire.EIO, wire.EIO},
		{wire.EOVERFLOW, wire.EINVAL, wire.EINVAL},
		{context.Canceled, wire.ESHUTDOWN, wire.ESHUTDOWN},
	} {
		mu.Lock()
		fail = c.err
		mu.Unlock()
		for _, r := range []*raw{simple, structured} {
			r.wantErrno(c.read, wire.CmdRead, 0, 0, 512, nil)
			r.wantErrno(c.write, wire.CmdWrite, 0, 0, 512, data)
			r.wantErrno(c.read, wire.CmdTrim, 0, 0, 512, nil)
			r.wantErrno(c.write, wire.CmdWriteZeroes, 0, 0, 512, nil)
			r.wantErrno(c.read, wire.CmdFlush, 0, 0, 0, nil)
		}
		structured.wantErrno(c.read, wire.CmdBlockStatus, 0, 0, 512, nil)
	}
	mu.Lock()
	fail = block.Errorf(block.Unsupported, "slow")
	mu.Unlock()
	simple.wantErrno(wire.ENOTSUP, wire.CmdWriteZeroes, wire.FlagFastZero, 0, 512, nil)
	mu.Lock()
	fail = nil
	mu.Unlock()
	simple.alive()
	structured.alive()
}

// TestLargeReads: 32 MiB in pieces, as one reply and in chunks, with an error in
// the middle.
func TestLargeReads(t *testing.T) {
	var mu sync.Mutex
	bad := int64(-1)
	d, exports := newVolume(blocktest.Options{Before: func(_ context.Context, op blocktest.Op, off, n int64) error {
		mu.Lock()
		defer mu.Unlock()
		if op == blocktest.OpRead && off <= bad && bad < off+n {
			return block.Errorf(block.Corrupt, "rot at %d", bad)
		}
		return nil
	}})
	addr, _ := serve(t, exports, nbd.Options{})
	const off, n = 12345, 32 << 20
	want := make([]byte, n)
	for i := range want[:20<<20] {
		want[i] = byte(i*7 + i>>12)
	}
	c := dial(t, addr, client.Options{})
	if err := c.Do(t.Context(), &client.Call{Command: wire.CmdWrite, Off: off, Data: want, Flags: wire.FlagFUA}); err != nil {
		t.Fatal(err)
	}
	check := make([]byte, 1<<20)
	if err := d.ReadAt(t.Context(), check, off+5<<20); err != nil || !bytes.Equal(check, want[5<<20:6<<20]) {
		t.Errorf("written wrong: %v", err)
	}
	for _, f := range []wire.CommandFlags{0, wire.FlagDF} {
		for _, o := range []client.Options{{}, {Simple: true}} {
			if o.Simple && f != 0 {
				continue
			}
			c := dial(t, addr, o)
			got := make([]byte, n)
			if err := c.Do(t.Context(), &client.Call{Command: wire.CmdRead, Off: off, Data: got, Flags: f}); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("%+v flags %#x: read other bytes", o, uint16(f))
			}
		}
	}

	mu.Lock()
	bad = 7 << 20
	mu.Unlock()
	r := rawEnter(t, addr, "vol", true)
	r.request(wire.CmdRead, 0, off, n, nil)
	var failed, holes, data int
	for done := false; !done; {
		p := r.reply(0)
		done = p.Done
		switch p.Type {
		case wire.ChunkErrorOffset:
			failed++
			if p.Errno != wire.EIO || p.off > 7<<20 || p.text == "" {
				t.Errorf("error %+v", p)
			}
		case wire.ChunkOffsetHole:
			holes++
		case wire.ChunkOffsetData:
			data++
			if p.Done {
				t.Errorf("data chunk is the last although one failed")
			}
		}
	}
	if failed != 1 || holes < 11 || data < 19 {
		t.Errorf("%d chunks failed, %d holes, %d data", failed, holes, data)
	}
	r.wantErrno(wire.EIO, wire.CmdRead, wire.FlagDF, off, n, nil)
	rawEnter(t, addr, "vol", false).wantErrno(wire.EIO, wire.CmdRead, 0, off, n, nil)
}

// TestBlockStatus: what the device says, in the terms of base:allocation.
func TestBlockStatus(t *testing.T) {
	d, exports := newVolume(blocktest.Options{})
	addr, _ := serve(t, exports, nbd.Options{})
	if err := errors.Join(d.WriteAt(t.Context(), make([]byte, 8192), 4096, 0), d.WriteZeroes(t.Context(), 8192, 4096, block.NoHole)); err != nil {
		t.Fatal(err)
	}
	r := rawEnter(t, addr, "vol", true)
	status := func(f wire.CommandFlags, off uint64, n uint32, want ...wire.State) {
		t.Helper()
		r.request(wire.CmdBlockStatus, f, off, n, nil)
		p := r.reply(0)
		_, states, err := wire.ParseBlockStatus(nil, p.Type, p.data)
		if err != nil || p.Type != wire.ChunkBlockStatus || !p.Done || len(states) != len(want) {
			t.Fatalf("%+v: %v %v", p.Reply, states, err)
		}
		for i := range want {
			if states[i] != want[i] {
				t.Errorf("extent %d of %d+%d is %v, want %v", i, off, n, states[i], want[i])
			}
		}
	}
	hole := wire.StateHole | wire.StateZero
	status(0, 0, volBytes, wire.State{Length: 4096, Flags: hole}, wire.State{Length: 4096}, wire.State{Length: 4096, Flags: wire.StateZero},
		wire.State{Length: volBytes - 12288, Flags: hole})
	status(wire.FlagReqOne, 0, volBytes, wire.State{Length: 4096, Flags: hole})
	status(0, 5000, 10, wire.State{Length: 10})
}

// TestGrow: requests beyond the size that a client entered with are answered
// once the volume has grown.
func TestGrow(t *testing.T) {
	d, exports := newVolume(blocktest.Options{})
	addr, _ := serve(t, exports, nbd.Options{})
	r := rawEnter(t, addr, "vol", false)
	data := make([]byte, 4096)
	r.wantErrno(wire.ENOSPC, wire.CmdWrite, 0, volBytes, 4096, data)
	d.Resize(2 * volBytes)
	r.wantErrno(0, wire.CmdWrite, 0, volBytes, 4096, data)
	if i, err := client.Info(t.Context(), addr, "vol"); err != nil || i.Bytes != 2*volBytes {
		t.Errorf("a new client is told %d bytes, %v", i.Bytes, err)
	}
	d.Resize(4096)
	r.wantErrno(wire.EINVAL, wire.CmdRead, 0, volBytes, 4096, nil)
	r.wantErrno(wire.ENOSPC, wire.CmdWrite, 0, volBytes, 4096, data)
}

// TestDisconnectEndsWhatIsInFlight: NBD_CMD_DISC waits for the requests before
// it; closing the socket cancels them.
func TestDisconnectEndsWhatIsInFlight(t *testing.T) {
	for _, disc := range []bool{true, false} {
		entered, release := make(chan error, 1), make(chan struct{})
		d := blocktest.New(blocktest.Options{Bytes: volBytes, Name: "vol", Before: func(ctx context.Context, op blocktest.Op, _, _ int64) error {
			if op != blocktest.OpWrite {
				return nil
			}
			entered <- nil
			select {
			case <-release:
				return nil
			case <-ctx.Done():
				entered <- ctx.Err()
				return block.Wrap(block.Canceled, ctx.Err(), "write")
			}
		}})
		left := make(chan struct{})
		addr, _ := serve(t, nbd.Fixed{*device.Export(d, func() { close(left) })}, nbd.Options{})
		r := rawEnter(t, addr, "vol", false)
		r.request(wire.CmdWrite, 0, 0, 4096, bytes.Repeat([]byte{7}, 4096))
		<-entered
		if disc {
			r.request(wire.CmdDisc, 0, 0, 0, nil)
			r.nc.Close()
			close(release)
		} else {
			r.nc.Close()
			if err := <-entered; err != context.Canceled {
				t.Errorf("write ended with %v", err)
			}
		}
		<-left
		p := make([]byte, 1)
		if err := d.ReadAt(t.Context(), p, 0); err != nil || (p[0] == 7) != disc {
			t.Errorf("disconnected %v: the write took effect: %v, %v", disc, p[0] == 7, err)
		}
	}
}

// minimal is a Backend without any optional interface, as those of go-nbd are.
type minimal struct {
	mu    sync.Mutex
	b     []byte
	syncs int
}

func (m *minimal) ReadAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := copy(p, m.b[off:])
	if off+int64(n) == int64(len(m.b)) {
		return n, io.EOF
	}
	return n, nil
}

func (m *minimal) WriteAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return copy(m.b[off:], p), nil
}

func (m *minimal) Size() (int64, error) { return int64(len(m.b)), nil }

func (m *minimal) Sync() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.syncs++
	return nil
}

func TestMinimalBackend(t *testing.T) {
	m := &minimal{b: make([]byte, 3<<20)}
	addr, _ := serve(t, nbd.Fixed{{Info: nbd.Info{Name: "m", MaxPiece: 100 << 10, Offers: nbd.OffersOf(m)}, Backend: m}}, nbd.Options{})
	c := dial(t, addr, client.Options{})
	if f := c.Export().Flags; f != wire.HasFlags|wire.SendFlush|wire.SendFUA|wire.SendWriteZeroes|wire.SendDF {
		t.Errorf("flags %#x", uint16(f))
	}
	want := bytes.Repeat([]byte("firn"), 750_000)
	do := func(call *client.Call, want error) {
		t.Helper()
		if err := c.Do(t.Context(), call); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", call.Command, err, want)
		}
	}
	do(&client.Call{Command: wire.CmdWrite, Data: want, Off: 100, Flags: wire.FlagFUA}, nil)
	if m.syncs == 0 {
		t.Errorf("FUA did not reach the backend")
	}
	do(&client.Call{Command: wire.CmdWriteZeroes, Bytes: 200_000, Off: 1000}, nil)
	clear(want[900:200_900])
	got := make([]byte, len(want))
	do(&client.Call{Command: wire.CmdRead, Data: got, Off: 100}, nil)
	if !bytes.Equal(got, want) {
		t.Errorf("read other bytes")
	}
	do(&client.Call{Command: wire.CmdRead, Data: make([]byte, 10), Off: 3<<20 - 10}, nil)
	do(&client.Call{Command: wire.CmdWriteZeroes, Bytes: 1, Flags: wire.FlagFastZero}, wire.ENOTSUP)
	do(&client.Call{Command: wire.CmdTrim, Bytes: 1}, wire.EINVAL)
	do(&client.Call{Command: wire.CmdCache, Bytes: 1}, wire.EINVAL)
	do(&client.Call{Command: wire.CmdBlockStatus, Bytes: 1}, wire.EINVAL)
}
