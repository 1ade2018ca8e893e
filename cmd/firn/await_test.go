package main

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// TestAwaitReadyEndsWithContext: what ready gave up is not asked again, even
// if the next question is due at that moment.
func TestAwaitReadyEndsWithContext(t *testing.T) {
	final := errors.New("no such volume")
	for range 64 {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			asked := 0
			err := awaitReady(ctx, func(context.Context) error {
				asked++
				<-time.After(time.Second) // longer than the tick
				cancel()
				return final
			})
			if asked != 1 || !errors.Is(err, final) {
				t.Fatalf("asked %d times, %v", asked, err)
			}
		})
	}
}
