package embed

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"firn.io/firn/nbd"
	"firn.io/firn/nbd/backend"
	"firn.io/firn/nbd/client"
	"firn.io/firn/nbd/server"
	"firn.io/firn/nbd/wire"
)

// counted is a Backend as go-nbd's users have written them: ReadAt, WriteAt,
// Size, Sync, and not safe for calls at the same time.
type counted struct {
	bytes []byte
	inUse sync.Mutex
	syncs int
}

func (c *counted) enter() {
	if !c.inUse.TryLock() {
		panic("two calls at once")
	}
}

func (c *counted) ReadAt(p []byte, off int64) (int, error) {
	c.enter()
	defer c.inUse.Unlock()
	return copy(p, c.bytes[off:]), nil
}

func (c *counted) WriteAt(p []byte, off int64) (int, error) {
	c.enter()
	defer c.inUse.Unlock()
	return copy(c.bytes[off:], p), nil
}

func (c *counted) Size() (int64, error) { return int64(len(c.bytes)), nil }

func (c *counted) Sync() error {
	c.enter()
	defer c.inUse.Unlock()
	c.syncs++
	return nil
}

// listen returns the address of a listener whose connections serve handles, each
// in a goroutine; the test waits for them.
func listen(t *testing.T, handle func(net.Conn) error) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				if err := handle(conn); err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
					t.Errorf("handle: %v", err)
				}
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		serving.Wait()
	})
	return l.Addr().String()
}

// roundTrip writes, syncs and reads back.
func roundTrip(t *testing.T, addr, export string) client.Export {
	t.Helper()
	c, err := client.Dial(t.Context(), addr, client.Options{Export: export})
	if err != nil {
		t.Fatal(err)
	}
	data, got := bytes.Repeat([]byte("embedded"), 4096), make([]byte, 8*4096)
	for _, call := range []*client.Call{
		{Command: wire.CmdWrite, Off: 100, Data: data},
		{Command: wire.CmdFlush},
		{Command: wire.CmdRead, Off: 100, Data: got},
	} {
		if err := c.Do(t.Context(), call); err != nil {
			t.Errorf("%s: %v", call.Command, err)
		}
	}
	if !bytes.Equal(got, data) {
		t.Errorf("other bytes were read back")
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	return c.Export()
}

// TestHandle is what a user of go-nbd has: a listener of its own and Handle.
func TestHandle(t *testing.T) {
	own := &counted{bytes: make([]byte, 1<<20)}
	f, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(2 << 20); err != nil {
		t.Fatal(err)
	}
	file, err := backend.NewFileBackend(f)
	if err != nil {
		t.Fatal(err)
	}
	exports := []*server.Export{
		{Name: "own", Description: "written for go-nbd", Backend: own},
		{Name: "file", Backend: file},
		{Name: "memory", Backend: backend.NewMemoryBackend(make([]byte, 3<<20))},
	}
	options := &server.Options{MinimumBlockSize: 512, PreferredBlockSize: 8192, MaximumBlockSize: 1 << 20, SupportsMultiConn: true}
	before := *options
	addr := listen(t, func(conn net.Conn) error { return server.Handle(conn, exports, options) })
	for i, e := range exports {
		info := roundTrip(t, addr, e.Name)
		if info.Bytes != uint64(i+1)<<20 || info.Description != e.Description || info.Blocks != (wire.BlockSizes{Min: 512, Preferred: 8192, Max: 1 << 20}) {
			t.Errorf("%+v", info)
		}
	}
	if own.syncs != 1 {
		t.Errorf("synced %d times", own.syncs)
	}
	if *options != before {
		t.Errorf("the options were changed: %+v", options)
	}
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	listed, err := client.List(t.Context(), conn)
	if err != nil || len(listed) != 3 || listed[0].Name != "own" || listed[0].Description != "written for go-nbd" {
		t.Errorf("listed %+v, %v", listed, err)
	}
}

// TestHandleReadOnly: options hold for every export.
func TestHandleReadOnly(t *testing.T) {
	exports := []*server.Export{{Name: "m", Backend: backend.NewMemoryBackend(make([]byte, 1<<20))}}
	addr := listen(t, func(conn net.Conn) error { return server.Handle(conn, exports, &server.Options{ReadOnly: true}) })
	c, err := client.Dial(t.Context(), addr, client.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.Do(t.Context(), &client.Call{Command: wire.CmdWrite, Data: make([]byte, 512)}); !errors.Is(err, nbd.EPERM) {
		t.Errorf("write: %v", err)
	}
	if c.Export().Flags&(wire.ReadOnly|wire.CanMultiConn) != wire.ReadOnly {
		t.Errorf("flags %#x", c.Export().Flags)
	}
}

// TestHandleContext: the end of the context is the end of the connection.
func TestHandleContext(t *testing.T) {
	here, there := net.Pipe()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() {
		ended <- server.HandleContext(ctx, there, []*server.Export{{Backend: backend.NewMemoryBackend(nil)}}, nil)
	}()
	if _, err := io.ReadFull(here, make([]byte, wire.GreetingLen)); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("ended with %v", err)
	}
}

// rooms are exports that exist when somebody asks for them.
type rooms struct {
	mu    sync.Mutex
	known map[string]nbd.Backend
	left  int
}

func (r *rooms) List(context.Context) ([]nbd.Info, error) { return nil, nil }

func (r *rooms) Info(_ context.Context, name string) (nbd.Info, error) {
	if name == "" {
		return nbd.Info{}, fs.ErrNotExist
	}
	return nbd.Info{Name: name, Bytes: 1 << 20, Offers: nbd.OfferZeroes}, nil
}

func (r *rooms) Open(ctx context.Context, name string) (*nbd.Export, error) {
	info, err := r.Info(ctx, name)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.known[name] == nil {
		r.known[name] = backend.NewMemoryBackend(make([]byte, 1<<20))
	}
	return &nbd.Export{Info: info, Backend: r.known[name], Close: func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.left++
	}}, nil
}

// TestServer is the server with exports that are not known beforehand.
func TestServer(t *testing.T) {
	r := &rooms{known: map[string]nbd.Backend{}}
	s := nbd.NewServer(r, nbd.Options{})
	l, err := nbd.Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error)
	go func() { served <- s.Serve(l) }()
	roundTrip(t, l.Addr().String(), "kitchen")
	roundTrip(t, l.Addr().String(), "cellar")
	if _, err := client.Dial(t.Context(), l.Addr().String(), client.Options{}); err == nil {
		t.Errorf("entered no room")
	}
	if err := s.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
	if err := <-served; err != nbd.ErrServerClosed {
		t.Error(err)
	}
	if len(r.known) != 2 || r.left != 2 {
		t.Errorf("%d rooms, %d left", len(r.known), r.left)
	}
}
