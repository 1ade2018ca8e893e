package nbd

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
)

func TestBudgetReserveFreesItsWaiter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBudget(1000)
		hog, small := newAllowance(b, 1<<30), newAllowance(b, 1<<30)
		if _, ok := hog.try(reserveBytes + 1000); !ok {
			t.Fatal("the whole budget is not free")
		}
		c, ok := small.try(reserveBytes)
		if !ok {
			t.Fatal("the reserve is not free")
		}
		// The reply was written, the next request is here, and only then is the
		// charge released: the waiter must get it although the total is gone.
		got := make(chan error)
		go func() {
			_, err := small.take(t.Context(), reserveBytes)
			got <- err
		}()
		synctest.Wait()
		c.release()
		if err := <-got; err != nil {
			t.Error(err)
		}
		if n := b.used(); n != 2*reserveBytes+1000 || b.free != 0 || len(b.waiting) != 0 {
			t.Errorf("%d used, %d free, %d waiting", n, b.free, len(b.waiting))
		}
	})
}

// TestBudgetOrder: a large request is not overtaken for ever by small ones, and
// one that only its own limit holds up blocks nobody.
func TestBudgetOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBudget(100)
		var a [4]*allowance
		for i := range a {
			a[i] = newAllowance(b, reserveBytes+100)
		}
		fill := func(i int, n int64) charge {
			t.Helper()
			c, ok := a[i].try(n)
			if !ok {
				t.Fatalf("allowance %d did not get %d", i, n)
			}
			return c
		}
		fill(0, reserveBytes)
		fill(1, reserveBytes)
		fill(2, reserveBytes)
		extra := fill(2, 60)
		order := make(chan int, 4)
		ctx, cancel := context.WithCancel(t.Context())
		take := func(i int, n int64) {
			go func() {
				if _, err := a[i].take(ctx, n); err == nil {
					order <- i
				} else if errors.Is(err, context.Canceled) {
					order <- -i
				}
			}()
			synctest.Wait()
		}
		take(2, 80) // over its own limit
		take(0, 70) // short of the total
		take(1, 30) // would fit, but waits its turn
		if len(order) != 0 {
			t.Fatalf("%d was granted", <-order)
		}
		fill(3, reserveBytes)
		if _, ok := a[3].try(10); ok {
			t.Error("overtook those who wait")
		}
		extra.release()
		synctest.Wait()
		if first := <-order; first != 2 || len(order) != 0 {
			t.Errorf("%d came first, %d more", first, len(order))
		}
		cancel()
		synctest.Wait()
		if b.free < 0 || len(b.waiting) != 0 {
			t.Errorf("%d free, %d waiting", b.free, len(b.waiting))
		}
	})
}

// take waits for n <= limit bytes, as begin says, while ctx lasts.
func (a *allowance) take(ctx context.Context, n int64) (charge, error) {
	w, c := a.begin(n)
	if w == nil {
		return c, nil
	}
	select {
	case <-w.ready:
		return charge{a, n}, nil
	case <-ctx.Done():
		return a.giveUp(w, ctx.Err())
	}
}
