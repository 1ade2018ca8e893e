package seglog

import "sync"

// each calls f for 0 to n-1, on so many goroutines at most, and waits for all.
// It returns the first error; what was not begun by then is left out. With one
// worker it runs in order on the caller's goroutine.
func each(workers, n int, f func(i int) error) error {
	if workers <= 1 || n <= 1 {
		for i := range n {
			if err := f(i); err != nil {
				return err
			}
		}
		return nil
	}
	var mu sync.Mutex
	var first error
	next := 0
	take := func() int {
		mu.Lock()
		defer mu.Unlock()
		if first != nil || next == n {
			return -1
		}
		next++
		return next - 1
	}
	var wait sync.WaitGroup
	for range min(workers, n) {
		wait.Go(func() {
			for i := take(); i >= 0; i = take() {
				if err := f(i); err != nil {
					mu.Lock()
					if first == nil {
						first = err
					}
					mu.Unlock()
				}
			}
		})
	}
	wait.Wait()
	return first
}

// inOrder calls use with load(0), load(1), ... in this order, while up to
// workers loads go on ahead of it. With one worker nothing is loaded ahead:
// use is given the zero value.
func inOrder[T any](workers, n int, load func(i int) T, use func(i int, v T)) {
	if workers <= 1 {
		for i := range n {
			var none T
			use(i, none)
		}
		return
	}
	results := make([]chan T, n)
	for i := range results {
		results[i] = make(chan T, 1)
	}
	room := make(chan struct{}, workers*aheadSegments)
	var wait sync.WaitGroup
	// Room is taken before an index is: whoever has the lowest index never waits
	// for the room of those that wait for its result.
	next := make(chan int)
	wait.Go(func() {
		defer close(next)
		for i := range n {
			room <- struct{}{}
			next <- i
		}
	})
	for range min(workers, n) {
		wait.Go(func() {
			for i := range next {
				results[i] <- load(i)
			}
		})
	}
	for i := range n {
		v := <-results[i]
		use(i, v)
		<-room
	}
	wait.Wait()
}
