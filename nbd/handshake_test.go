package nbd_test

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"testing"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/block/blocktest"
	"firn.io/firn/nbd"
	"firn.io/firn/nbd/client"
	"firn.io/firn/nbd/device"
	"firn.io/firn/nbd/wire"
)

// catalog is an Exports whose exports are attached when they are entered, as
// Firn's volumes are; it counts.
type catalog struct {
	devices     map[string]*blocktest.Device
	names       []string
	opens, ends atomic.Int64
	openErr     error
}

func newCatalog(names ...string) *catalog {
	c := &catalog{devices: map[string]*blocktest.Device{}, names: names}
	for i, name := range names {
		c.devices[name] = blocktest.New(blocktest.Options{Name: name, Bytes: int64(i+1) << 20})
	}
	return c
}

func (c *catalog) List(context.Context) (infos []nbd.Info, _ error) {
	for _, name := range c.names {
		infos = append(infos, nbd.Info{Name: name, Description: "about " + name})
	}
	return infos, nil
}

func (c *catalog) Info(_ context.Context, name string) (nbd.Info, error) {
	d := c.devices[name]
	if d == nil {
		return nbd.Info{}, block.Errorf(block.NotFound, "volume %q does not exist", name)
	}
	return device.Info(d.Geometry()), nil
}

func (c *catalog) Open(ctx context.Context, name string) (*nbd.Export, error) {
	if _, err := c.Info(ctx, name); err != nil {
		return nil, err
	}
	if c.openErr != nil {
		return nil, c.openErr
	}
	c.opens.Add(1)
	return device.Export(c.devices[name], func() { c.ends.Add(1) }), nil
}

func TestHandshakeExportName(t *testing.T) {
	addr, _ := serve(t, newCatalog("vol"), nbd.Options{})
	for _, c := range []struct {
		flags wire.ClientFlags
		pad   int
	}{{0, 124}, {wire.ClientFixedNewstyle, 124}, {wire.ClientNoZeroes, 0}, {wire.ClientFixedNewstyle | wire.ClientNoZeroes, 0}} {
		r := rawDial(t, addr, int64(c.flags))
		r.send(wire.AppendOption(nil, wire.OptExportName, []byte("vol")))
		p := r.read(10 + c.pad)
		i, err := wire.ParseInfoReply(append([]byte{0, 0}, p[:10]...))
		if err != nil || i.Size != 1<<20 || i.Flags&(wire.HasFlags|wire.SendFUA) != wire.HasFlags|wire.SendFUA || i.Flags&wire.SendDF != 0 {
			t.Errorf("flags %d: %+v %v", c.flags, i, err)
		}
		if len(bytes.Trim(p[10:], "\x00")) != 0 {
			t.Errorf("padding is not zero")
		}
		r.alive()
		r.request(wire.CmdDisc, 0, 0, 0, nil)
		r.wantClosed()
	}
	for name, data := range map[string][]byte{"unknown": []byte("none"), "long": bytes.Repeat([]byte("n"), 4097), "binary": {0xff, 0}} {
		r := rawDial(t, addr, rawFlags)
		r.nc.Write(wire.AppendOption(nil, wire.OptExportName, data))
		t.Log(name)
		r.wantClosed()
	}
}

func TestHandshakeFlags(t *testing.T) {
	addr, _ := serve(t, newCatalog("vol"), nbd.Options{})
	r := rawDial(t, addr, 4)
	r.wantClosed()
	// A client that is not fixed newstyle has no option but EXPORT_NAME.
	r = rawDial(t, addr, 0)
	r.send(wire.AppendOption(nil, wire.OptList, nil))
	r.wantClosed()
	r = rawDial(t, addr, rawFlags)
	r.send(bytes.Repeat([]byte("GET / HTTP/1.1\r\n"), 2))
	r.wantClosed()
}

func TestHandshakeList(t *testing.T) {
	addr, _ := serve(t, newCatalog("a", "b", "c"), nbd.Options{})
	nc, err := net.Dial("unix", strings.TrimPrefix(addr, "unix:"))
	if err != nil {
		t.Fatal(err)
	}
	exports, err := client.List(t.Context(), nc)
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(exports); strings.Count(got, "about") != 3 || exports[2].Name != "c" || exports[2].Description != "about c" {
		t.Errorf("listed %v", got)
	}
	r := rawDial(t, addr, rawFlags)
	r.wantRefusal(wire.OptList, []byte("x"), wire.RepErrInvalid)
	if n := len(r.wantAck(wire.OptList, nil)); n != 3 {
		t.Errorf("%d exports", n)
	}
	r.wantAck(wire.OptAbort, nil)
	r.wantClosed()
}

// TestHandshakeInfoThenGo: what INFO named is not what GO enters (a server that
// keeps the export of the last INFO serves the wrong one).
func TestHandshakeInfoThenGo(t *testing.T) {
	c := newCatalog("one", "two")
	addr, _ := serve(t, c, nbd.Options{})
	r := rawDial(t, addr, rawFlags)
	infos := r.wantAck(wire.OptInfo, wire.AppendInfoRequest(nil, "two", wire.InfoName, wire.InfoDescription, wire.InfoBlockSize, 77))
	var seen []wire.InfoType
	for _, a := range infos {
		i, err := wire.ParseInfoReply(a.data)
		if err != nil {
			t.Fatal(err)
		}
		seen = append(seen, i.Type)
		switch {
		case i.Type == wire.InfoExport && i.Size != 2<<20,
			i.Type == wire.InfoName && i.Text != "two",
			i.Type == wire.InfoBlockSize && i.Blocks != wire.BlockSizes{Min: 1, Preferred: 4096, Max: 32 << 20}:
			t.Errorf("information %+v", i)
		}
	}
	if len(seen) != 4 {
		t.Errorf("information %v", seen)
	}
	if n := c.opens.Load(); n != 0 {
		t.Errorf("INFO attached")
	}
	r.wantRefusal(wire.OptGo, wire.AppendInfoRequest(nil, "no-such-export"), wire.RepErrUnknown)
	r.wantRefusal(wire.OptGo, wire.AppendInfoRequest(nil, ""), wire.RepErrUnknown)
	r.wantRefusal(wire.OptInfo, wire.AppendInfoRequest(nil, "no-such-export"), wire.RepErrUnknown)
	r.wantAck(wire.OptGo, wire.AppendInfoRequest(nil, "one"))
	r.wantErrno(wire.EINVAL, wire.CmdRead, 0, 1<<20, 1, nil)
	if c.opens.Load() != 1 || c.ends.Load() != 0 {
		t.Errorf("%d opened, %d closed", c.opens.Load(), c.ends.Load())
	}
	r.request(wire.CmdDisc, 0, 0, 0, nil)
	r.wantClosed()
	if c.ends.Load() != 1 {
		t.Errorf("the socket was closed before the export")
	}
}

func TestHandshakeRefusals(t *testing.T) {
	c := newCatalog("vol")
	addr, _ := serve(t, c, nbd.Options{})
	r := rawDial(t, addr, rawFlags)
	r.wantRefusal(wire.OptStartTLS, nil, wire.RepErrUnsup)
	r.wantRefusal(wire.OptExtendedHeaders, []byte{1}, wire.RepErrInvalid)
	r.wantRefusal(wire.Option(4), nil, wire.RepErrUnsup)
	r.wantRefusal(wire.Option(12345), make([]byte, 60000), wire.RepErrUnsup)
	r.wantRefusal(wire.OptInfo, nil, wire.RepErrInvalid)
	r.wantRefusal(wire.OptGo, []byte{0xff, 0xff, 0xff, 0xff, 0, 0}, wire.RepErrInvalid)
	r.wantRefusal(wire.OptGo, wire.AppendInfoRequest(nil, strings.Repeat("n", 4097)), wire.RepErrInvalid)
	r.wantRefusal(wire.OptStructuredReply, []byte{1}, wire.RepErrInvalid)
	r.wantRefusal(wire.OptGo, make([]byte, 64<<10+1), wire.RepErrTooBig)
	r.wantRefusal(wire.OptGo, make([]byte, 1<<20), wire.RepErrTooBig)

	for kind, want := range map[block.Kind]wire.OptReply{
		block.Busy: wire.RepErrPolicy, block.Denied: wire.RepErrPolicy, block.Unavailable: wire.RepErrPlatform, block.Internal: wire.RepErrPlatform,
	} {
		c.openErr = block.Errorf(kind, "gateway 7 has it")
		if text := r.wantRefusal(wire.OptGo, wire.AppendInfoRequest(nil, "vol"), want); text != "gateway 7 has it" {
			t.Errorf("text %q", text)
		}
	}
	for _, x := range []struct {
		err  error
		want wire.OptReply
	}{
		{block.Wrap(block.Unavailable, context.DeadlineExceeded, "etcd"), wire.RepErrPlatform},
		{block.Wrap(block.Canceled, context.DeadlineExceeded, "attach"), wire.RepErrShutdown},
		{fmt.Errorf("wait: %w", context.DeadlineExceeded), wire.RepErrShutdown},
	} {
		c.openErr = x.err
		r.wantRefusal(wire.OptGo, wire.AppendInfoRequest(nil, "vol"), x.want)
	}
	c.openErr = nil
	r.wantAck(wire.OptGo, wire.AppendInfoRequest(nil, "vol"))
	r.alive()
}

func TestHandshakeLimits(t *testing.T) {
	addr, s := serve(t, newCatalog("vol"), nbd.Options{})
	r := rawDial(t, addr, rawFlags)
	for range 32 {
		r.wantRefusal(wire.OptStartTLS, nil, wire.RepErrUnsup)
	}
	r.nc.Write(wire.AppendOption(nil, wire.OptGo, wire.AppendInfoRequest(nil, "vol")))
	r.wantClosed()

	// Only the head of an option that claims 4 GiB is ever read.
	r = rawDial(t, addr, rawFlags)
	head := wire.AppendOption(nil, wire.OptGo, nil)
	copy(head[12:], []byte{0xff, 0xff, 0xff, 0xff})
	r.send(head)
	r.wantClosed()
	if n := s.Stats().HandshakeFailures; n != 2 {
		t.Errorf("%d failures counted", n)
	}
}

// TestHandshakeMetaContext: a selection holds for the export it named.
func TestHandshakeMetaContext(t *testing.T) {
	addr, _ := serve(t, newCatalog("a", "b"), nbd.Options{})
	set := func(export string, q ...string) []byte { return wire.AppendMetaRequest(nil, export, q...) }
	status := func(r *raw, want wire.Errno) {
		t.Helper()
		r.headers = wire.StructuredReplies
		cookie := r.request(wire.CmdBlockStatus, 0, 0, 4096, nil)
		if p := r.reply(0); p.Cookie != cookie || p.Errno != want || p.Simple {
			t.Errorf("status: %+v, want %v", p, want)
		}
	}
	r := rawDial(t, addr, rawFlags)
	r.wantRefusal(wire.OptSetMetaContext, set("a", "base:allocation"), wire.RepErrInvalid)
	r.wantAck(wire.OptStructuredReply, nil)
	r.wantRefusal(wire.OptSetMetaContext, set("none", "base:allocation"), wire.RepErrUnknown)
	r.wantRefusal(wire.OptListMetaContext, []byte{0}, wire.RepErrInvalid)
	for _, c := range []struct {
		o    wire.Option
		data []byte
		n    int
	}{
		{wire.OptListMetaContext, set("a"), 1},
		{wire.OptListMetaContext, set("a", "base:"), 1},
		{wire.OptListMetaContext, set("a", "qemu:"), 0},
		{wire.OptListMetaContext, set("a", "x:y", "base:allocation", "base:"), 1},
		{wire.OptSetMetaContext, set("a"), 0},
		{wire.OptSetMetaContext, set("a", "base:"), 0},
		{wire.OptSetMetaContext, set("a", "base:allocation", "x:y"), 1},
	} {
		if got := r.wantAck(c.o, c.data); len(got) != c.n || c.n == 1 && got[0].reply != wire.RepMetaContext {
			t.Errorf("option %d %q: %v", c.o, c.data, got)
		}
	}
	r.wantAck(wire.OptGo, wire.AppendInfoRequest(nil, "b"))
	status(r, wire.EINVAL)

	r = rawDial(t, addr, rawFlags)
	r.enter("a", true)
	status(r, 0)

	// A later SET that fails forgets the one before.
	r = rawDial(t, addr, rawFlags)
	r.wantAck(wire.OptStructuredReply, nil)
	r.wantAck(wire.OptSetMetaContext, set("a", "base:allocation"))
	r.wantRefusal(wire.OptSetMetaContext, []byte{9}, wire.RepErrInvalid)
	r.wantAck(wire.OptGo, wire.AppendInfoRequest(nil, "a"))
	status(r, wire.EINVAL)
}

func TestTransmissionFlags(t *testing.T) {
	c := newCatalog("rw", "ro")
	c.devices["ro"].SetReadOnly(true)
	addr, _ := serve(t, c, nbd.Options{})
	rw := wire.HasFlags | wire.SendFlush | wire.SendFUA | wire.SendTrim | wire.SendWriteZeroes | wire.CanMultiConn | wire.SendCache | wire.SendFastZero
	ro := wire.HasFlags | wire.ReadOnly | wire.SendFlush | wire.SendFUA | wire.CanMultiConn | wire.SendCache
	for _, x := range []struct {
		export string
		o      client.Options
		want   wire.ExportFlags
	}{
		{"rw", client.Options{}, rw | wire.SendDF},
		{"rw", client.Options{Simple: true}, rw},
		{"rw", client.Options{Simple: true, ExportName: true}, rw},
		{"rw", client.Options{ExportName: true}, rw | wire.SendDF},
		{"ro", client.Options{}, ro | wire.SendDF},
	} {
		x.o.Export = x.export
		if got := dial(t, addr, x.o).Export().Flags; got != x.want {
			t.Errorf("%+v: flags %#x, want %#x", x.o, uint16(got), uint16(x.want))
		}
	}
	i, err := client.Info(t.Context(), addr, "ro")
	if err != nil || i.Flags != ro || i.Bytes != 2<<20 || i.Name != "ro" {
		t.Errorf("information %+v, %v", i, err)
	}
}
