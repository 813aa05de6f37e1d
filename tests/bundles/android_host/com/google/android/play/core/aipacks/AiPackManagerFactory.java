package com.google.android.play.core.aipacks;

import android.content.Context;

public class AiPackManagerFactory {
    public static AiPackManager getInstance(Context context) {
        throw new UnsupportedOperationException();
    }
}
