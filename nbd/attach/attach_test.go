package attach

import (
	"context"
	"errors"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/block/blocktest"
	"firn.io/firn/nbd"
	"firn.io/firn/nbd/device"
)

// driver stands for the kernel: it takes sockets and keeps nothing of them.
type driver struct {
	mu        sync.Mutex
	setup     Setup
	reconnect int
	over      bool
	dead      chan int
}

func (k *driver) Connect(s Setup) (int, error) { k.setup = s; return 7, nil }
func (k *driver) Reconnect(index int, backend string, fd int) (bool, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.reconnect++
	// As the kernel that has not seen the old one die, the first time.
	return k.reconnect > 1, nil
}
func (k *driver) Resize(int, string, int64) error { return nil }
func (k *driver) Disconnect(int) error            { return nil }
func (k *driver) Connected(int) bool              { k.mu.Lock(); defer k.mu.Unlock(); return !k.over }
func (k *driver) Find(string) (int, bool)         { return 0, false }
func (k *driver) Dead() <-chan int                { return k.dead }
func (k *driver) Close() error                    { return nil }

// one is an Exports of one volume.
type one struct{ d *blocktest.Device }

func (o one) List(context.Context) ([]nbd.Info, error) { return nil, nil }
func (o one) Info(context.Context, string) (nbd.Info, error) {
	return device.Info(o.d.Geometry()), nil
}
func (o one) Open(context.Context, string) (*nbd.Export, error) {
	return device.Export(o.d, func() {}), nil
}

func serve(t *testing.T, d *blocktest.Device) (addr string, stop func()) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := nbd.NewServer(one{d}, nbd.Options{})
	over := make(chan struct{})
	go func() { defer close(over); s.Serve(l) }()
	stop = sync.OnceFunc(func() {
		ctx, cancel := context.WithCancel(context.Background())
		cancel() // at once
		s.Shutdown(ctx)
		<-over
	})
	t.Cleanup(stop)
	return l.Addr().String(), stop
}

func TestMovesToTheOtherServer(t *testing.T) {
	t.Parallel()
	volume := blocktest.New(blocktest.Options{Name: "v", Bytes: 1 << 20})
	a, stopA := serve(t, volume)
	b, _ := serve(t, volume)
	k := &driver{dead: make(chan int)}
	changes := make(chan Status, 64)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	d, err := Attach(ctx, Config{Export: "v", Gateways: []string{a, b}, Kernel: k, Index: -1, Changed: func(s Status) { changes <- s }})
	if err != nil {
		t.Fatal(err)
	}
	if s := d.Status(); k.setup.Bytes != 1<<20 || k.setup.Backend != volume.Geometry().ID.String() || len(k.setup.FDs) != 1 || k.setup.RequestTime != 5*time.Second || s.Gateway != a || s.Index != 7 {
		t.Errorf("setup %+v, status %+v", k.setup, s)
	}
	ran := make(chan error, 1)
	go func() { ran <- d.Run(ctx) }()
	stopA()
	for s := range changes {
		if s.Moves == 1 {
			if s.Gateway != b || s.Live != 1 || s.Problem != "" {
				t.Errorf("moved: %+v", s)
			}
			break
		}
	}
	k.mu.Lock()
	k.over = true
	k.mu.Unlock()
	k.dead <- 7
	if err := <-ran; err != nil {
		t.Errorf("Run of a device that was disconnected: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

// catalog is an Exports of volumes by names that change, and by their UUIDs.
type catalog struct {
	mu    sync.Mutex
	named map[string]*blocktest.Device
}

func (c *catalog) find(name string) (*blocktest.Device, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if d, ok := c.named[name]; ok {
		return d, nil
	}
	for _, d := range c.named {
		if d.Geometry().ID.String() == name {
			return d, nil
		}
	}
	return nil, block.Errorf(block.NotFound, "there is no volume %q", name)
}

func (c *catalog) List(context.Context) ([]nbd.Info, error) { return nil, nil }
func (c *catalog) Info(_ context.Context, name string) (nbd.Info, error) {
	d, err := c.find(name)
	if err != nil {
		return nbd.Info{}, err
	}
	return device.Info(d.Geometry()), nil
}
func (c *catalog) Open(_ context.Context, name string) (*nbd.Export, error) {
	d, err := c.find(name)
	if err != nil {
		return nil, err
	}
	return device.Export(d, func() {}), nil
}

// TestFollowsARename: a device whose volume was renamed finds it again, also when
// another volume has its old name, and when the old name is its own again.
func TestFollowsARename(t *testing.T) {
	t.Parallel()
	volume := blocktest.New(blocktest.Options{Name: "v", Bytes: 1 << 20, ID: block.VolumeID{1}})
	stranger := blocktest.New(blocktest.Options{Name: "v", Bytes: 1 << 20, ID: block.VolumeID{2}})
	exports := &catalog{named: map[string]*blocktest.Device{"v": volume}}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := nbd.NewServer(exports, nbd.Options{})
	over := make(chan struct{})
	go func() { defer close(over); s.Serve(l) }()
	defer func() { s.Close(); <-over }()
	changes := make(chan Status, 256)
	ctx, cancel := context.WithCancel(context.Background())
	d, err := Attach(ctx, Config{Export: "v", Gateways: []string{l.Addr().String()}, Kernel: &driver{dead: make(chan int), reconnect: 1}, Index: -1,
		Changed: func(s Status) { changes <- s }})
	if err != nil {
		t.Fatal(err)
	}
	ran := make(chan error, 1)
	go func() { ran <- d.Run(ctx) }()
	for i, named := range []map[string]*blocktest.Device{{"w": volume}, {"w": volume, "v": stranger}, {"x": volume}, {"v": volume}} {
		exports.mu.Lock()
		exports.named = named
		exports.mu.Unlock()
		cut, err := s.Disconnect(ctx, func(_ nbd.Client, e nbd.Info) bool { return e.ID == volume.Geometry().ID.String() })
		if cut != 1 || err != nil {
			t.Fatalf("%d: cut %d, %v", i, cut, err)
		}
		patience := time.After(10 * time.Second)
		for back := false; !back; {
			select {
			case s := <-changes:
				back = s.Reconnects == uint64(i+1)
			case <-patience:
				t.Fatalf("%d: not connected again: %+v", i, d.Status())
			}
		}
	}
	cancel()
	if err := <-ran; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

func TestAdopt(t *testing.T) {
	t.Parallel()
	volume := blocktest.New(blocktest.Options{Name: "v", Bytes: 1 << 20})
	addr, _ := serve(t, volume)
	live := make(chan Status, 64)
	last := Status{Export: "v", Backend: volume.Geometry().ID.String(), Index: 7, Connections: 1, Gateway: addr, Session: block.FormatUUID(block.NewUUID())}
	d, err := Adopt(Config{Export: "v", Gateways: []string{addr}, Kernel: &driver{dead: make(chan int)}, Changed: func(s Status) { live <- s }}, last)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- d.Run(ctx) }()
	for s := range live {
		if s.Live == 1 {
			break
		}
	}
	cancel()
	if err := <-ran; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

func TestAttachRefuses(t *testing.T) {
	t.Parallel()
	for _, c := range []Config{{}, {Export: "v"}, {Export: "v", Gateways: []string{"x"}, Connections: 17}, {Export: "v", Gateways: []string{"x"}, BlockBytes: 1000},
		{Export: "v", Gateways: []string{"x"}, RequestTime: time.Millisecond}} {
		if _, err := Attach(context.Background(), c); err == nil || block.KindOf(err) != block.Invalid {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

func TestNames(t *testing.T) {
	t.Parallel()
	if got := order([]string{"a", "b", "c"}, "b"); !slices.Equal(got, []string{"b", "a", "c"}) {
		t.Errorf("order %v", got)
	}
	for text, want := range map[string]int{"/dev/nbd3": 3, "nbd12": 12, "/dev/sda": -1, "nbdx": -1, "vol": -1} {
		if index, ok := ParseDevice(text); ok != (want >= 0) || ok && index != want {
			t.Errorf("ParseDevice(%q) = %d, %v", text, index, ok)
		}
	}
	if _, err := indexOf([]byte{1, 2, 3}); err == nil || errors.Is(err, context.Canceled) {
		t.Errorf("a message without an index: %v", err)
	}
}
