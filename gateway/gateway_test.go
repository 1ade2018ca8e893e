package gateway

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/clock"
	"firn.io/firn/internal/loop"
)

// shop is a Storage of one volume that counts.
type shop struct {
	t    *testing.T
	loop *loop.System

	mu       sync.Mutex
	backends []*memory
	name     string
	gate     chan struct{} // attaches wait for it
	err      error
	away     bool // the metadata cannot be asked
	silent   bool // the metadata does not answer
}

func newShop(t *testing.T, after time.Duration) (*shop, *Gateway) {
	s := &shop{t: t, loop: loop.NewSystem(clock.System{}, loop.DefaultLimits), name: "test", gate: make(chan struct{})}
	close(s.gate)
	t.Cleanup(s.loop.Stop)
	return s, New(Options{Loop: s.loop, DetachAfter: after, Storage: Storage{Attach: s.attach, Find: s.find, List: s.list}})
}

func (s *shop) attach(ctx context.Context, id block.VolumeID) (Backend, error) {
	s.mu.Lock()
	gate, err := s.gate, s.err
	s.mu.Unlock()
	select {
	case <-gate:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if err != nil {
		return nil, err
	}
	m := newMemory(s.t, s.loop, 1<<20)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.backends = append(s.backends, m)
	return m, nil
}

func (s *shop) find(ctx context.Context, name string) (block.Geometry, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.silent {
		<-ctx.Done()
		return block.Geometry{}, block.Wrap(block.Canceled, ctx.Err(), "no answer")
	}
	if s.away {
		return block.Geometry{}, block.Errorf(block.Unavailable, "no answer")
	}
	if name != s.name {
		return block.Geometry{}, block.Errorf(block.NotFound, "there is no volume %q", name)
	}
	return block.Geometry{Name: "test", ID: block.VolumeID{1}, SizeBytes: 1 << 20}, nil
}

func (s *shop) list(context.Context) ([]block.Geometry, error) {
	return []block.Geometry{{Name: s.name}}, nil
}

func (s *shop) attached() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.backends)
}

// closed tells how many backends were closed, as the loop knows it.
func (s *shop) closed() (n int) {
	s.loop.Call(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, b := range s.backends {
			if b.closed {
				n++
			}
		}
	})
	return n
}

func open(t *testing.T, g *Gateway, name string) *Handle {
	t.Helper()
	h, err := g.Open(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func TestOpenAttachesOnce(t *testing.T) {
	s, g := newShop(t, time.Hour)
	s.gate = make(chan struct{})
	var wg sync.WaitGroup
	handles := make([]*Handle, 8)
	for i := range handles {
		wg.Go(func() { handles[i] = open(t, g, "test") })
	}
	close(s.gate)
	wg.Wait()
	if s.attached() != 1 {
		t.Errorf("attached %d times", s.attached())
	}
	for _, h := range handles {
		if err := h.WriteAt(t.Context(), make([]byte, 512), 0, 0); err != nil {
			t.Error(err)
		}
	}
	if v := g.Volumes(); len(v) != 1 || v[0].Clients != 8 || v[0].Stats.Writes != 8 {
		t.Errorf("%+v", v)
	}
	for _, h := range handles {
		h.Release()
		h.Release()
	}
	if v := g.Volumes(); len(v) != 1 || v[0].Clients != 0 {
		t.Errorf("%+v", v)
	}
	// A client that comes back in time finds the same attachment.
	open(t, g, "test").Release()
	if s.attached() != 1 {
		t.Errorf("attached %d times", s.attached())
	}
	if err := g.Close(t.Context()); err != nil || s.closed() != 1 {
		t.Errorf("%v, %d closed", err, s.closed())
	}
	if _, err := g.Open(t.Context(), "test"); !errors.Is(err, block.Unavailable) {
		t.Errorf("open after close: %v", err)
	}
}

func TestDetachAfterTheLastClient(t *testing.T) {
	s, g := newShop(t, time.Millisecond)
	h := open(t, g, "test")
	h2 := open(t, g, "test")
	h.Release()
	if err := h2.WriteAt(t.Context(), make([]byte, 512), 0, 0); err != nil {
		t.Fatal(err)
	}
	h2.Release()
	for s.closed() == 0 {
		s.loop.Call(func() {})
	}
	if err := h2.WriteAt(t.Context(), make([]byte, 512), 0, 0); !errors.Is(err, block.Canceled) {
		t.Errorf("write after detach: %v", err)
	}
	open(t, g, "test")
	if s.attached() != 2 {
		t.Errorf("attached %d times", s.attached())
	}
}

func TestFailedAttachIsNotKept(t *testing.T) {
	s, g := newShop(t, time.Hour)
	s.err = block.Errorf(block.Busy, "taken")
	if _, err := g.Open(t.Context(), "test"); !errors.Is(err, block.Busy) {
		t.Fatalf("%v", err)
	}
	if _, err := g.Open(t.Context(), "other"); !errors.Is(err, block.NotFound) {
		t.Fatalf("%v", err)
	}
	s.mu.Lock()
	s.err = nil
	s.mu.Unlock()
	open(t, g, "test").Release()
}

// TestEndedVolumeIsReplaced: after another took the volume, a new client attaches
// anew, and old handles fail.
func TestEndedVolumeIsReplaced(t *testing.T) {
	s, g := newShop(t, time.Hour)
	h := open(t, g, "test")
	s.loop.Call(func() { s.backends[0].ended(block.Errorf(block.Fenced, "taken")) })
	if err := h.Flush(t.Context()); !errors.Is(err, block.Fenced) {
		t.Errorf("%v", err)
	}
	h2 := open(t, g, "test")
	if s.attached() != 2 {
		t.Errorf("attached %d times", s.attached())
	}
	h.Release()
	if err := h2.WriteAt(t.Context(), make([]byte, 512), 0, 0); err != nil {
		t.Error(err)
	}
}

func TestCallerGivesUpWhileAttaching(t *testing.T) {
	s, g := newShop(t, time.Millisecond)
	gate := make(chan struct{})
	s.gate = gate
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := g.Open(ctx, "test"); !errors.Is(err, block.Canceled) {
		t.Fatalf("%v", err)
	}
	close(gate)
	// What was attached for nobody is detached by itself.
	for s.closed() == 0 {
		s.loop.Call(func() {})
	}
}

func TestDetachByForce(t *testing.T) {
	s, g := newShop(t, time.Hour)
	if err := g.Detach(t.Context(), block.VolumeID{1}, true); !errors.Is(err, block.NotFound) {
		t.Errorf("%v", err)
	}
	h := open(t, g, "test")
	if err := g.Detach(t.Context(), block.VolumeID{1}, false); !errors.Is(err, block.Busy) {
		t.Errorf("%v", err)
	}
	if err := g.Detach(t.Context(), block.VolumeID{1}, true); err != nil {
		t.Fatal(err)
	}
	if s.closed() != 1 || len(g.Volumes()) != 0 {
		t.Error("still attached")
	}
	if err := h.ReadAt(t.Context(), make([]byte, 512), 0); !errors.Is(err, block.Canceled) {
		t.Errorf("%v", err)
	}
	h.Release()
	open(t, g, "test")
	all, err := g.List(t.Context())
	if err != nil || !slices.ContainsFunc(all, func(b block.Geometry) bool { return b.Name == "test" }) {
		t.Errorf("%v %v", all, err)
	}
}

// TestReconnectWithoutMetadata: what is open stays reachable, by name and by
// UUID, well before a client gives up asking; what is not is not.
func TestReconnectWithoutMetadata(t *testing.T) {
	s, g := newShop(t, time.Hour)
	h := open(t, g, "test")
	for _, silent := range []bool{false, true} {
		s.mu.Lock()
		s.away, s.silent = !silent, silent
		s.mu.Unlock()
		for _, name := range []string{"test", block.VolumeID{1}.String()} {
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			geometry, err := g.Find(ctx, name)
			if err != nil || geometry.ID != h.Geometry().ID {
				t.Errorf("find %s, silent: %v: %+v, %v", name, silent, geometry, err)
			}
			h2, err := g.Open(ctx, name)
			if err != nil || h2.Volume != h.Volume {
				t.Errorf("open %s, silent: %v: %v", name, silent, err)
			}
			cancel()
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := g.Find(ctx, "test"); !errors.Is(err, block.Canceled) {
		t.Errorf("a caller that gave up: %v", err)
	}
	s.mu.Lock()
	s.away, s.silent = true, false
	s.mu.Unlock()
	if _, err := g.Open(t.Context(), "other"); !errors.Is(err, block.Unavailable) {
		t.Errorf("%v", err)
	}
}

// doneHook is a context that calls hook when somebody first waits for its end.
type doneHook struct {
	context.Context
	once sync.Once
	hook func()
}

func (d *doneHook) Done() <-chan struct{} {
	d.once.Do(d.hook)
	return d.Context.Done()
}

// TestDetachRobsNobody: a client that comes while a volume without clients is
// detached is either found, or attaches anew; it is never cut off.
func TestDetachRobsNobody(t *testing.T) {
	_, g := newShop(t, time.Hour)
	open(t, g, "test").Release()
	ctx := &doneHook{Context: t.Context()}
	ctx.hook = func() {
		asking, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if _, err := g.Open(asking, "test"); !errors.Is(err, block.Canceled) {
			t.Errorf("a client was let in to a volume that is being detached: %v", err)
		}
	}
	if err := g.Detach(ctx, block.VolumeID{1}, false); err != nil {
		t.Fatal(err)
	}
	h := open(t, g, "test")
	if err := h.Flush(t.Context()); err != nil {
		t.Error(err)
	}
}
