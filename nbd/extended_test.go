package nbd_test

import (
	"bytes"
	"context"
	"runtime"
	"testing"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/block/blocktest"
	"firn.io/firn/nbd"
	"firn.io/firn/nbd/client"
	"firn.io/firn/nbd/device"
	"firn.io/firn/nbd/nbdtest"
	"firn.io/firn/nbd/wire"
)

// hugeDevice is mostly a hole, and larger than 32 bits can say.
type hugeDevice struct {
	block.Device
	trimmed, zeroed []int64
}

const hugeBytes = 8 << 40

func (d *hugeDevice) Geometry() block.Geometry {
	return block.Geometry{Name: "huge", SizeBytes: hugeBytes, LogicalBlockBytes: 512, PreferredBytes: 4096, MaxBytes: 1 << 20}
}

func (d *hugeDevice) Trim(_ context.Context, off, n int64, _ block.Flags) error {
	d.trimmed = append(d.trimmed, off, n)
	return nil
}

func (d *hugeDevice) WriteZeroes(_ context.Context, off, n int64, _ block.Flags) error {
	d.zeroed = append(d.zeroed, off, n)
	return nil
}

func (d *hugeDevice) Extents(_ context.Context, dst []block.Extent, off, n int64, max int) ([]block.Extent, error) {
	return append(dst, block.Extent{Bytes: n, State: block.Hole}), nil
}

// rawExtended enters with extended headers.
func rawExtended(t testing.TB, addr, export string) *raw {
	r := rawDial(t, addr, rawFlags)
	r.wantAck(wire.OptExtendedHeaders, nil)
	r.wantAck(wire.OptSetMetaContext, wire.AppendMetaRequest(nil, export, wire.BaseAllocation))
	r.wantAck(wire.OptGo, wire.AppendInfoRequest(nil, export))
	r.headers = wire.ExtendedHeaders
	return r
}

// TestExtendedNegotiation: extended headers include structured replies, and are
// agreed on once.
func TestExtendedNegotiation(t *testing.T) {
	addr, _ := serve(t, newCatalog("vol"), nbd.Options{})
	r := rawDial(t, addr, rawFlags)
	r.wantAck(wire.OptStructuredReply, nil)
	r.wantAck(wire.OptExtendedHeaders, nil)
	r.wantRefusal(wire.OptExtendedHeaders, nil, wire.RepErrInvalid)
	r.wantRefusal(wire.OptStructuredReply, nil, wire.RepErrExtHeaderReqd)
	r.wantAck(wire.OptSetMetaContext, wire.AppendMetaRequest(nil, "vol", wire.BaseAllocation))
	for _, a := range r.wantAck(wire.OptGo, wire.AppendInfoRequest(nil, "vol")) {
		i, err := wire.ParseInfoReply(a.data)
		if err != nil || i.Type == wire.InfoExport && i.Flags&(wire.BlockStatusPayload|wire.SendDF) != wire.BlockStatusPayload|wire.SendDF {
			t.Errorf("%+v %v", i, err)
		}
	}
	r.headers = wire.ExtendedHeaders
	r.alive()
	// A compact request is not one any more.
	r.headers = wire.SimpleReplies
	r.request(wire.CmdFlush, 0, 0, 0, nil)
	r.request(wire.CmdFlush, 0, 0, 0, nil)
	r.wantClosed()
}

// TestExtendedBytes: a conversation in bytes, written by hand from the
// extension's text.
func TestExtendedBytes(t *testing.T) {
	d, exports := newVolume(blocktest.Options{})
	addr, _ := serve(t, exports, nbd.Options{})
	if err := d.WriteAt(t.Context(), []byte("firn"), 512, 0); err != nil {
		t.Fatal(err)
	}
	r := rawExtended(t, addr, "vol")
	for _, c := range []struct{ name, send, want string }{
		{"read", "21e41c71 0000 0000 000000000000abcd 0000000000000200 0000000000000004",
			"6e8a278c 0001 0001 000000000000abcd 0000000000000200 000000000000000c 0000000000000200 6669726e"},
		{"write", "21e41c71 0021 0001 000000000000abce 0000000000000200 0000000000000002 4649",
			"6e8a278c 0001 0000 000000000000abce 0000000000000200 0000000000000000"},
		{"read what was written", "21e41c71 0000 0000 000000000000abcf 0000000000000200 0000000000000004",
			"6e8a278c 0001 0001 000000000000abcf 0000000000000200 000000000000000c 0000000000000200 4649726e"},
		{"status", "21e41c71 0008 0007 000000000000abd0 0000000000001000 0000000000001000",
			"6e8a278c 0001 0006 000000000000abd0 0000000000001000 0000000000000018 00000001 00000001 0000000000001000 0000000000000003"},
		{"status of named contexts", "21e41c71 0028 0007 000000000000abd1 0000000000001000 000000000000000c 0000000000001000 00000001",
			"6e8a278c 0001 0006 000000000000abd1 0000000000001000 0000000000000018 00000001 00000001 0000000000001000 0000000000000003"},
		{"flush", "21e41c71 0000 0003 000000000000abd2 0000000000000000 0000000000000000",
			"6e8a278c 0001 0000 000000000000abd2 0000000000000000 0000000000000000"},
	} {
		r.send(unhex(t, c.send))
		want := unhex(t, c.want)
		if got := r.read(len(want)); !bytes.Equal(got, want) {
			t.Errorf("%s: got %x, want %x", c.name, got, want)
		}
	}
}

// TestExtendedLengths: one request for more than 32 bits say.
func TestExtendedLengths(t *testing.T) {
	d := &hugeDevice{Device: blocktest.New(blocktest.Options{Bytes: 1 << 20})}
	addr, _ := serve(t, nbd.Fixed{*device.Export(d, nil)}, nbd.Options{})
	c := dial(t, addr, client.Options{Export: "huge", Extended: true})
	for _, call := range []*client.Call{
		{Command: wire.CmdTrim, Off: 512, Bytes: 5 << 40},
		{Command: wire.CmdWriteZeroes, Flags: wire.FlagFastZero, Off: 0, Bytes: hugeBytes},
		{Command: wire.CmdCache, Off: 0, Bytes: 1 << 33},
	} {
		if err := c.Do(t.Context(), call); err != nil {
			t.Errorf("%s: %v", call.Command, err)
		}
	}
	if len(d.trimmed) != 2 || d.trimmed[1] != 5<<40 || len(d.zeroed) != 2 || d.zeroed[1] != hugeBytes {
		t.Errorf("trimmed %d, zeroed %d", d.trimmed, d.zeroed)
	}
	call := &client.Call{Command: wire.CmdBlockStatus, Off: 1 << 40, Bytes: 5 << 40}
	if err := c.Do(t.Context(), call); err != nil || len(call.States) != 1 || call.States[0] != (wire.State{Length: 5 << 40, Flags: wire.StateHole | wire.StateZero}) {
		t.Errorf("status %v, %v", call.States, err)
	}
	r := rawExtended(t, addr, "huge")
	for _, c := range []struct {
		want   wire.Errno
		cmd    wire.Command
		off, n uint64
	}{
		{wire.EINVAL, wire.CmdTrim, 1, hugeBytes},
		{wire.EINVAL, wire.CmdTrim, 1, 1<<64 - 1},
		{wire.ENOSPC, wire.CmdWriteZeroes, 1 << 63, 1 << 63},
		{wire.EINVAL, wire.CmdRead, 0, 1 << 40},
		{wire.EINVAL, wire.CmdBlockStatus, 1<<64 - 1, 1<<64 - 1},
	} {
		cookie := r.request64(c.cmd, 0, c.off, c.n, nil)
		if p := r.reply(0); p.Cookie != cookie || p.Errno != c.want || p.Simple || !p.Done || p.Offset != c.off {
			t.Errorf("%s of %d at %d: %+v, want %v", c.cmd, c.n, c.off, p, c.want)
		}
	}
	r.alive()
}

// TestExtendedPayloads: a payload is consumed whether or not the command takes
// one.
func TestExtendedPayloads(t *testing.T) {
	_, exports := newVolume(blocktest.Options{})
	addr, s := serve(t, exports, nbd.Options{})
	r := rawExtended(t, addr, "vol")
	payload := func(n int) []byte { return bytes.Repeat([]byte{1}, n) }
	for _, c := range []struct {
		want wire.Errno
		cmd  wire.Command
		data []byte
	}{
		{wire.EINVAL, wire.CmdRead, payload(512)},
		{wire.EINVAL, wire.CmdTrim, payload(1 << 20)},
		{wire.EINVAL, wire.CmdFlush, payload(8)},
		{wire.EINVAL, 99, payload(70_000)},
		{wire.EINVAL, wire.CmdBlockStatus, nil},
		{wire.EINVAL, wire.CmdBlockStatus, wire.AppendStatusPayload(nil, 4096)},
		{wire.EINVAL, wire.CmdBlockStatus, wire.AppendStatusPayload(nil, 4096, 2)},
		{wire.EINVAL, wire.CmdBlockStatus, wire.AppendStatusPayload(nil, 4096, 1, 1)},
		{wire.EINVAL, wire.CmdBlockStatus, wire.AppendStatusPayload(nil, 0, 1)},
		{wire.EINVAL, wire.CmdBlockStatus, payload(1 << 16)},
		{0, wire.CmdWrite, payload(512)},
	} {
		r.wantErrno(c.want, c.cmd, wire.FlagPayloadLen, 0, uint32(len(c.data)), c.data)
		r.alive()
	}
	r.wantErrno(0, wire.CmdWrite, 0, 0, 512, payload(512))
	r.request64(wire.CmdTrim, wire.FlagPayloadLen, 0, 1<<40, nil)
	r.wantClosed()
	for s.Stats().Violations != 1 {
		runtime.Gosched()
	}
}

// TestExtendedConformance runs the suite of block.Device.
func TestExtendedConformance(t *testing.T) {
	blocktest.Run(t, func(t testing.TB, size int64) block.Device {
		addr, _ := serve(t, nbd.Fixed{*device.Export(blocktest.New(blocktest.Options{Bytes: size}), nil)}, nbd.Options{})
		return nbdtest.New(dial(t, addr, client.Options{Extended: true}))
	})
}
